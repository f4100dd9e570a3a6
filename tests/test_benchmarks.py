"""What the benchmarks compare with computes the same."""

import numpy as np
import pytest

from benchmarks import soak
from tests import test_parity
from tests.support import golden_setup

pytestmark = pytest.mark.optimized


@pytest.mark.parametrize(
  "scheme",
  ["iteration", pytest.param("authors_iteration", marks=pytest.mark.long)],
)
def test_the_peer_computes_the_authors_numbers(scheme, x64):
  torch = pytest.importorskip("torch")
  from benchmarks import peer_torch

  settings, recorded = golden_setup.read(test_parity.FILES[-1])
  setup = golden_setup.Setup(settings)
  start, sources = setup.start()
  state, meta_params, source = peer_torch.from_jax(
    start, sources[""], setup.pairs, lambda tensor: tensor
  )
  update = peer_torch.adam_l2(
    meta_params, settings["meta_lr"], settings["meta_weight_decay"]
  )
  for it in range(2):
    batch = setup.batch(it)
    state, grads, metrics = getattr(peer_torch, scheme)(
      state,
      meta_params,
      source,
      torch.from_numpy(np.array(batch.images).transpose(0, 3, 1, 2)),
      torch.from_numpy(np.array(batch.labels)),
      peer_torch.Settings(
        settings["T"],
        settings["beta"],
        settings["lr"],
        settings["momentum"],
        settings["weight_decay"],
      ),
    )
    update(grads)
    computed = metrics | {
      "meta_grad_norm": _norm(grads),
      "meta_param_norm": _norm(meta_params),
    }
    if it == 0:
      computed |= {f"meta_grad/{name}": x for name, x in grads.items()}
    for name, value in state.params.items():
      computed[f"target_param_norm/{name.removeprefix('target.')}"] = (
        value.norm()
      )
    for name, value in computed.items():
      golden_setup.assert_equal(
        value.detach().numpy(), recorded[f"it{it}/{name}"], name
      )


def _norm(tensors):
  return sum(x.square().sum() for x in tensors.values()).sqrt()


def test_slopes_of_a_soak():
  """Memory grows by 2 MiB per 1,000 iterations once the run is warm."""
  samples = [
    soak.Sample(
      iteration=100 * n,
      seconds=10.0 * n,
      processor_seconds=20.0 * n if n < 55 else 20.0 * 55 + 30.0 * (n - 55),
      memory=500 + 0.2 * n if n >= 10 else 100,
      workers_memory=50.0,
      files=30,
      threads=20,
    )
    for n in range(100)
  ]
  found = soak.slopes(samples)
  assert found["memory"] == pytest.approx(2)
  assert found["files"] == pytest.approx(0, abs=1e-9)
  assert found["seconds_first_half"] == pytest.approx(100)
  assert found["processor_seconds_first_half"] == pytest.approx(200)
  assert found["processor_seconds_last_half"] == pytest.approx(300)
