"""pquant_jax: compress any JAX model to a hardware budget, as RTL proved bit-identical to what was trained.

>>> import jax.numpy as jnp, pquant_jax as pq
>>> model = pq.from_function(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 2), jnp.float32)})
>>> inst = pq.instrument(model, jnp.ones((1, 4)))
>>> compression = pq.chain(pq.prune.dst(alpha=5e-6), pq.quantize.hgq(inst.sites, beta=1e-5, cost=inst.ebops))
>>> compression.name
'chain(dst, hgq)'
"""

from pquant_jax import constrain, data, graph, nn, numerics, prune, quantize, robust, search, train, transforms, trees
from pquant_jax._base import KIF, AxisRole, Event, InputSpec, Params, SiteSpec, Stage, Transform, View
from pquant_jax._errors import (
    ConfigError,
    DataError,
    LoweringError,
    PQuantError,
    SearchError,
    ToolError,
    TraceError,
    TrainingError,
    TransformError,
    VerifyError,
)
from pquant_jax.graph import (
    Instrumented,
    Model,
    ebops,
    from_equinox,
    from_function,
    from_linen,
    from_nnx,
    instrument,
    shrink,
    sparsity_summary,
    summary_text,
)
from pquant_jax.lower import Gap, check
from pquant_jax.numerics import kif, mask, site
from pquant_jax.quantize import explain, template
from pquant_jax.search import scan
from pquant_jax.train import Metric, Plan, Result, calibrate, finalize, fit, load_final, save_final
from pquant_jax.transforms import (
    as_optax,
    boundary,
    chain,
    identity,
    masked,
    named,
    optimizer,
    pnorm_decay,
    state_of,
    update_state,
    with_hyper,
)

__version__ = "0.1.0"

__all__ = [
    "KIF",
    "AxisRole",
    "ConfigError",
    "DataError",
    "Event",
    "Gap",
    "InputSpec",
    "Instrumented",
    "LoweringError",
    "Metric",
    "Model",
    "PQuantError",
    "Params",
    "Plan",
    "Result",
    "SearchError",
    "SiteSpec",
    "Stage",
    "ToolError",
    "TraceError",
    "TrainingError",
    "Transform",
    "TransformError",
    "VerifyError",
    "View",
    "as_optax",
    "boundary",
    "calibrate",
    "chain",
    "check",
    "constrain",
    "data",
    "ebops",
    "explain",
    "finalize",
    "fit",
    "from_equinox",
    "from_function",
    "from_linen",
    "from_nnx",
    "graph",
    "identity",
    "instrument",
    "kif",
    "load_final",
    "mask",
    "masked",
    "named",
    "nn",
    "numerics",
    "optimizer",
    "pnorm_decay",
    "prune",
    "quantize",
    "robust",
    "save_final",
    "scan",
    "search",
    "shrink",
    "site",
    "sparsity_summary",
    "state_of",
    "summary_text",
    "template",
    "train",
    "transforms",
    "trees",
    "update_state",
    "with_hyper",
]
