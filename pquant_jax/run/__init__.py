"""An experiment from its configuration to a proved netlist: run directories, and everything that is done in one."""

from pquant_jax.run._doctor import Check, checks, skips
from pquant_jax.run._forest import forest
from pquant_jax.run._predict import predict
from pquant_jax.run._report import write_report
from pquant_jax.run._robust import robust
from pquant_jax.run._run import lower, resume, run, verify
from pquant_jax.run._scan import scan
from pquant_jax.run._signals import Stopped
from pquant_jax.run._sites import explain, template
from pquant_jax.run._weights import weights

__all__ = [
    "Check",
    "Stopped",
    "checks",
    "explain",
    "forest",
    "lower",
    "predict",
    "resume",
    "robust",
    "run",
    "scan",
    "skips",
    "template",
    "verify",
    "weights",
    "write_report",
]
