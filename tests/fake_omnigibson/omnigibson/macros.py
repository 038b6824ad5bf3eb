import os
from types import SimpleNamespace

gm = SimpleNamespace(DATA_PATH=os.environ["OMNIGIBSON_DATA_PATH"])
