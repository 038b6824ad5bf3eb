"""robosuite 1.4.1's operational space control (OSC_POSE, Khatib 1987) amid a control step, bit for bit.

`robot.control` looks up names and limits and computes the hand's Jacobian four times in each of a step's 25
substeps; here names are looked up once a step, and the Jacobian is computed once a substep.
"""

import mujoco
import numpy as np


def prepare(model, data, robot, action):
    """-> a function that sets `data.ctrl` to what `robot.control(action)` makes of the state that it finds.

    action: float64 (7,), whose last number, the fingers', alone counts; the controller has the arm's goal.
    """
    from robosuite.utils.control_utils import nullspace_torques, opspace_matrices, orientation_error

    controller, gripper, nv = robot.controller, robot.gripper, model.nv
    site, joints, dofs = model.site(controller.eef_name).id, controller.qpos_index, controller.qvel_index
    arm, (low, high) = robot._ref_joint_actuator_indexes, robot.torque_limits
    fingers = [model.actuator(name).id for name in gripper.actuators]
    limits = model.actuator_ctrlrange[fingers]
    bias, weight = 0.5 * (limits[:, 1] + limits[:, 0]), 0.5 * (limits[:, 1] - limits[:, 0])
    whole, jacp, jacr = np.empty((nv, nv)), np.zeros((3, nv)), np.zeros((3, nv))
    grip = action[controller.control_dim :]

    def run():
        mujoco.mj_jacSite(model, data, jacp, jacr, site)
        mujoco.mj_fullM(model, whole, data.qM)
        mass = whole[dofs, :][:, dofs]
        J_pos, J_ori = jacp[:, dofs], jacr[:, dofs]
        J_full = np.vstack([J_pos, J_ori])
        turned = orientation_error(controller.goal_ori, data.site_xmat[site].reshape(3, 3).copy())
        moved = controller.goal_pos - data.site_xpos[site]
        force = moved * controller.kp[:3] + -np.dot(jacp, data.qvel) * controller.kd[:3]
        torque = turned * controller.kp[3:] + -np.dot(jacr, data.qvel) * controller.kd[3:]
        _, lambda_pos, lambda_ori, nullspace = opspace_matrices(mass, J_full, J_pos, J_ori)
        wrench = np.concatenate([np.dot(lambda_pos, force), np.dot(lambda_ori, torque)])
        torques = np.dot(J_full.T, wrench) + data.qfrc_bias[dofs]
        torques += nullspace_torques(
            mass, nullspace, controller.initial_joint, data.qpos[joints], data.qvel[dofs]
        )
        data.ctrl[arm] = np.clip(torques, low, high)
        data.ctrl[fingers] = bias + weight * gripper.format_action(grip)

    return run
