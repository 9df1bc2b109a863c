"""Frames of a domain, rendered off screen in a process of its own: MuJoCo chooses its OpenGL once a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from pipelines.environments import Array, _suite

PLATFORMS = ("egl", "osmesa")
WIDTH, HEIGHT = 240, 180  # pixels of a frame
SECONDS = 120  # after which rendering is given up


def strip(domain: str, physics: Array, file: Path) -> bool:
    """Write frames of positions and velocities (n, nq + nv) side by side as PNG, and return whether that was possible.

    It is not where neither EGL nor OSMesa renders off screen.
    """
    for platform in PLATFORMS:
        try:
            done = subprocess.run(
                [sys.executable, "-m", __name__, domain, str(file)],
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


def main(domain: str, file: str) -> None:
    """Render the rows on the standard input, seen by the camera that follows the domain from its side."""
    import mujoco
    from PIL import Image

    model = _suite.load(domain)
    data, frames = mujoco.MjData(model), []
    renderer = mujoco.Renderer(model, HEIGHT, WIDTH)
    for row in np.frombuffer(sys.stdin.buffer.read()).reshape(-1, model.nq + model.nv):
        data.qpos[:], data.qvel[:] = row[: model.nq], row[model.nq :]
        mujoco.mj_forward(model, data)
        renderer.update_scene(data, "side")
        frames.append(renderer.render())
    renderer.close()
    Image.fromarray(np.concatenate(frames, 1)).save(file, format="png", optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
