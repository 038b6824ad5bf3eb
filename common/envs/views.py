"""Where things are in a MuJoCo camera's square picture: points, and what stands beside it."""

import mujoco
import numpy as np


def outside(model, data, camera):
    """-> bool (geoms,): whose box is wholly beyond a side of the camera's square view, or behind it."""
    camera = model.camera(camera).id
    sin, cos = (f(np.deg2rad(model.cam_fovy[camera]) / 2) for f in (np.sin, np.cos))
    normals = np.array([[cos, 0, sin], [-cos, 0, sin], [0, cos, sin], [0, -cos, sin], [0, 0, 1]])  # outward
    normals = normals @ data.cam_xmat[camera].reshape(3, 3).T
    axes = data.geom_xmat.reshape(-1, 3, 3)
    boxes = model.geom_aabb  # centre and half sizes, in the geom's frame
    centres = data.geom_xpos + np.einsum("gij,gj->gi", axes, boxes[:, :3]) - data.cam_xpos[camera]
    extents = np.einsum("pgj,gj->pg", np.abs(np.einsum("pi,gij->pgj", normals, axes)), boxes[:, 3:])
    return (normals @ centres.T > extents).any(0) & (model.geom_type != mujoco.mjtGeom.mjGEOM_PLANE)


def project(model, data, camera, points):
    """Where points (n, 3) are in a camera's square picture: float32 (n, 2), x right and y down, in [-1, 1];
    nan where one is out of sight."""
    eye, fovy = data.camera(camera), model.camera(camera).fovy[0]
    ways = (np.asarray(points) - eye.xpos) @ eye.xmat.reshape(3, 3)  # it looks along -z
    found = ways[:, :2] / ways[:, 2:] / np.tan(np.deg2rad(fovy) / 2) * [-1, 1]
    found[~(np.abs(found) <= 1).all(1) | (ways[:, 2] > 0)] = np.nan
    return found.astype(np.float32)
