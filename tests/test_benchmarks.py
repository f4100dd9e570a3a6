"""What the benchmarks compare with computes the same."""

import numpy as np
import pytest

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
