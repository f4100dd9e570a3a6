"""Images in the format that a source network wants."""

import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax.data import image_formats

GREY = image_formats.ImageFormat(4, 1, (0.25,), (0.5,))
RGB = image_formats.ImageFormat(4, 3, (0.1, 0.2, 0.3), (0.5, 0.25, 1.0))


def test_the_same_format_passes_untouched():
  images = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
  assert image_formats.convert(images, GREY, GREY) is images


def test_grey_becomes_three_equal_channels():
  images = jnp.full((1, 4, 4, 1), 0.5)  # 0.5 * 0.5 + 0.25 = 0.5 of white.
  converted = image_formats.convert(images, GREY, RGB)
  by_hand = [(0.5 - 0.1) / 0.5, (0.5 - 0.2) / 0.25, (0.5 - 0.3) / 1.0]
  np.testing.assert_allclose(converted[0, 0, 0], by_hand, rtol=1e-6)


def test_colour_becomes_luminance():
  white = (1 - jnp.array(RGB.mean)) / jnp.array(RGB.std)
  red = (jnp.array([1.0, 0, 0]) - jnp.array(RGB.mean)) / jnp.array(RGB.std)
  images = jnp.broadcast_to(
    jnp.stack([white, red])[:, None, None], (2, 4, 4, 3)
  )
  converted = image_formats.convert(images, RGB, GREY)
  np.testing.assert_allclose(
    converted[:, 0, 0, 0], [(1 - 0.25) / 0.5, (0.299 - 0.25) / 0.5], rtol=1e-5
  )


def test_sizes_change_and_positions_stay():
  large = GREY._replace(size=8)
  ramp = jnp.broadcast_to(jnp.arange(4.0)[:, None, None], (1, 4, 4, 1))
  converted = image_formats.convert(ramp, GREY, large)
  # Half-pixel centres.
  np.testing.assert_allclose(
    converted[0, :, 0, 0], [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3], atol=1e-6
  )
  back = image_formats.convert(jnp.ones((1, 8, 8, 1)), large, GREY)
  np.testing.assert_allclose(back, 1, rtol=1e-6)
  assert back.shape == (1, 4, 4, 1)
