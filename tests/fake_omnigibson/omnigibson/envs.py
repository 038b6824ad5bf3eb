from omnigibson import WISH, Environment
from omnigibson.macros import gm

assert gm.HEADLESS  # set before

if WISH["api"] == "vector":

    class VectorEnvironment:
        def __init__(self, num_envs, config):
            assert num_envs == 1
            self.envs = [Environment(config, in_vec_env=True)]
            self.step, self.reset = self.envs[0].step, self.envs[0].reset
