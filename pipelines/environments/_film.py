"""Frames of a domain, rendered off screen in a process of its own: MuJoCo chooses its OpenGL once a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from pipelines.base import plugins
from pipelines.environments import Array

PLATFORMS = ("egl", "osmesa")
WIDTH, HEIGHT = 240, 180  # pixels of a frame
SECONDS = 120  # after which rendering is given up


def strip(module: str, physics: Array, file: Path) -> bool:
    """Write frames side by side as PNG, and return whether EGL or OSMesa renders them off screen.

    Args:
        module: Module of the domain.
        physics: What MuJoCo integrates in each frame, positions and velocities first, (n, nq + nv + ...).
        file: File to write.
    """
    for platform in PLATFORMS:
        try:
            done = subprocess.run(
                [sys.executable, "-m", __name__, module, str(physics.shape[1]), str(file)],
                input=physics.tobytes(),
                env={**os.environ, "MUJOCO_GL": platform},
                capture_output=True,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            continue
        if done.returncode == 0:
            return True
    return False


def main(module: str, width: str, file: str) -> None:
    """Render the rows on the standard input, seen by the camera that follows the body."""
    import mujoco
    from PIL import Image

    plugin = plugins.load("pipelines.environments", module.rpartition(".")[2])
    domain = plugin.build(plugin.Settings())
    model, frames = domain.model, []
    data, renderer = mujoco.MjData(model), mujoco.Renderer(model, HEIGHT, WIDTH)
    for row in np.frombuffer(sys.stdin.buffer.read()).reshape(-1, int(width)):
        data.qpos[:], data.qvel[:] = row[: model.nq], row[model.nq : model.nq + model.nv]
        mujoco.mj_forward(model, data)
        renderer.update_scene(data, domain.camera)
        frames.append(renderer.render())
    renderer.close()
    Image.fromarray(np.concatenate(frames, 1)).save(file, format="png", optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
