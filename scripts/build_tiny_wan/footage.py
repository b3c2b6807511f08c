"""Endless footage to train the small VAE on: moving shapes, and noise films that resemble nothing and everything.

A VAE that has seen only flat shapes blurs real footage to mush. Films of textures with a 1/f spectrum (the spectrum of
natural images), moving, turning, zooming and changing in brightness, with textured polygons sliding over them, teach it
edges, gradients and motion in general, so that it also keeps real clips recognisable although it never sees one.
"""

import numpy as np
import torch
import torch.nn.functional as F
from tiny_world.shapes import FRAME_SIZE, NUM_FRAMES, all_attributes, draw_clip
from torch import Tensor

_TEXTURE_SIZE = 192


class Footage:
    """Random crops of shapes and noise films; every draw follows from `seed`."""

    def __init__(self, seed: int, num_textures: int = 256, num_shape_clips: int = 384) -> None:
        self.rng = np.random.default_rng(seed)
        self.textures_N3HW = torch.stack([self._texture() for _ in range(num_textures)])
        words = all_attributes()
        clips = [draw_clip(words[i % len(words)], self.rng) for i in range(num_shape_clips)]
        self.shapes_NTHW3 = torch.from_numpy(np.stack(clips))

    def batch(self, num_films: int, num_frames: int, size: int, shapes_share: float) -> Tensor:
        """Films in [-1, 1], [B, 3, T, size, size]; about `shapes_share` of them show the shapes world."""
        films = [
            self._shapes(num_frames, size) if self.rng.random() < shapes_share else self._noise(num_frames, size)
            for _ in range(num_films)
        ]
        return torch.stack(films)

    def _shapes(self, num_frames: int, size: int) -> Tensor:
        clip = self.shapes_NTHW3[self.rng.integers(len(self.shapes_NTHW3))]
        start = self.rng.integers(NUM_FRAMES - num_frames + 1)
        y, x = self.rng.integers(FRAME_SIZE - size + 1, size=2)
        crop = clip[start : start + num_frames, y : y + size, x : x + size]
        return crop.permute(3, 0, 1, 2).float() / 127.5 - 1

    def _noise(self, num_frames: int, size: int) -> Tensor:
        """A moving background, none to three moving polygons over it, a slow change of brightness and contrast."""
        film_T3HW = self._moving_texture(num_frames, size)
        for _ in range(self.rng.integers(4)):
            mask_T1HW = self._moving_polygon(num_frames, size)
            film_T3HW = film_T3HW + mask_T1HW * (self._moving_texture(num_frames, size) - film_T3HW)
        time = torch.linspace(-1, 1, num_frames)[:, None, None, None]
        gain = self.rng.uniform(0.5, 1.2) * (1 + self.rng.normal(0, 0.1) * time)
        film_T3HW = film_T3HW * gain + self.rng.normal(0, 0.25) + self.rng.normal(0, 0.1) * time
        return film_T3HW.clamp(-1, 1).permute(1, 0, 2, 3)

    def _texture(self) -> Tensor:
        """Coloured noise with a 1/f**a spectrum [3, H, W], about unit range; `a` from crisp to cloudy."""
        frequency = np.hypot(np.fft.fftfreq(_TEXTURE_SIZE)[:, None], np.fft.rfftfreq(_TEXTURE_SIZE)[None])
        frequency[0, 0] = np.inf
        spectrum = np.fft.rfft2(self.rng.normal(size=(3, _TEXTURE_SIZE, _TEXTURE_SIZE)))
        noise = np.fft.irfft2(spectrum * frequency ** -self.rng.uniform(1.1, 2.3))
        noise /= noise.std(axis=(1, 2), keepdims=True)
        # Mostly one shared brightness pattern, less colour, as in natural images; sometimes thresholded to hard edges.
        mixed = 0.8 * noise[:1] + self.rng.uniform(0.2, 1.0) * noise
        if self.rng.random() < 0.3:
            mixed = np.tanh(self.rng.uniform(3, 12) * mixed)
        colour = self.rng.uniform(-0.7, 0.7, size=(3, 1, 1))
        return torch.from_numpy(0.35 * mixed + colour).float()

    def _moving_texture(self, num_frames: int, size: int) -> Tensor:
        texture = self.textures_N3HW[self.rng.integers(len(self.textures_N3HW))]
        if self.rng.random() < 0.15:
            return texture.mean(dim=(1, 2))[None, :, None, None].expand(num_frames, 3, size, size)
        grid = F.affine_grid(self._affine(num_frames, size), [num_frames, 3, size, size], align_corners=False)
        images = texture[None].expand(num_frames, -1, -1, -1)
        return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)

    def _affine(self, num_frames: int, size: int) -> Tensor:
        """One smooth camera move [T, 2, 3]: zoom, turn and drift, each at a constant rate."""
        time = np.arange(num_frames)
        scale = size / _TEXTURE_SIZE * self.rng.uniform(0.5, 2.0) * np.exp(self.rng.normal(0, 0.01) * time)
        angle = self.rng.uniform(0, 2 * np.pi) + self.rng.normal(0, 0.02) * time
        drift = self.rng.normal(0, 0.012, size=2) * (self.rng.random() < 0.8)
        centre = self.rng.uniform(-0.5, 0.5, size=2) + drift * time[:, None]
        turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], axis=-1).reshape(-1, 2, 2)
        return torch.from_numpy(np.concatenate([turn * scale[:, None, None], centre[..., None]], axis=-1)).float()

    def _moving_polygon(self, num_frames: int, size: int) -> Tensor:
        """Anti-aliased mask [T, 1, H, W] of a convex polygon (three to nine sides) that slides and turns."""
        num_sides = self.rng.integers(3, 10)
        angles = (
            np.sort(self.rng.uniform(0, 2 * np.pi, num_sides))
            + self.rng.normal(0, 0.03) * np.arange(num_frames)[:, None]
        )
        reach = self.rng.uniform(0.1, 0.4, num_sides) * size
        centre = self.rng.uniform(0, size, 2) + self.rng.normal(0, 2.0, 2) * np.arange(num_frames)[:, None]
        rows, columns = np.mgrid[0:size, 0:size] + 0.5
        offset = np.stack([columns, rows]) - centre[:, :, None, None]
        normals = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
        distance = np.einsum("tsd,tdhw->tshw", normals, offset) - reach[:, None, None]
        return torch.from_numpy(np.clip(0.5 - distance.max(axis=1), 0, 1)).float()[:, None]
