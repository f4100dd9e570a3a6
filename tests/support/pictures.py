"""What is written in a picture, and where."""

import itertools

from matplotlib import text as mpl_text
from matplotlib.backends import backend_agg


def draw_texts(fig, monkeypatch):
  """Draw a figure; return (text, its box, its angle) of all that is written."""
  drawn = []
  draw_text = backend_agg.RendererAgg.draw_text

  def record(self, gc, x, y, s, prop, angle, ismath=False, mtext=None):
    assert not ismath, f"{s!r} is read as a formula"
    drawn.append(mtext)
    draw_text(self, gc, x, y, s, prop, angle, ismath, mtext)

  monkeypatch.setattr(backend_agg.RendererAgg, "draw_text", record)
  backend_agg.FigureCanvasAgg(fig).draw()
  # An annotation's own extent includes its arrow.
  extent = mpl_text.Text.get_window_extent
  return [(t.get_text(), extent(t), t.get_rotation()) for t in drawn]


def assert_inside(fig, texts):
  for text, box, _ in texts:
    assert min(box.x0, box.y0) >= 0, text
    assert box.x1 <= fig.bbox.x1 and box.y1 <= fig.bbox.y1, text


def assert_apart(texts):
  for (a, box_a, _), (b, box_b, _) in itertools.combinations(texts, 2):
    width = min(box_a.x1, box_b.x1) - max(box_a.x0, box_b.x0)
    height = min(box_a.y1, box_b.y1) - max(box_a.y0, box_b.y0)
    assert width < 1 or height < 1, f"{a!r} overlaps {b!r}"
