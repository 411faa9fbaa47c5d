"""The oracle against the C++ types that HLS synthesizes: ap_fixed and ap_ufixed, compiled here.

WRAP_SM is compared under TRN only: ap_fixed decides the reflection on the bits before rounding, `quantizers` (and this
package) after it, and ap_ufixed refuses it.  A signed SAT_SYM of one bit is -1 or 0 in ap_fixed and only 0 here.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pquant_jax.numerics import oracle

SOURCE = """
#include "ap_fixed.h"
#include <cstdio>
template <class T> void run(const char *name) {
  std::printf("%s", name);
  for (int m = -400; m <= 400; m++) { T v = m / 8.0; std::printf(" %.10g", v.to_double()); }
  std::printf("\\n");
}
#define ONE(W, I, Q, O) \\
  run<ap_fixed<W, I, Q, O>>("1," #W "," #I "," #Q "," #O); run<ap_ufixed<W, I, Q, O>>("0," #W "," #I "," #Q "," #O);
#define ROUNDED(W, I, Q) ONE(W, I, Q, AP_SAT) ONE(W, I, Q, AP_SAT_SYM) ONE(W, I, Q, AP_WRAP)
#define FORMAT(W, I) \\
  ROUNDED(W, I, AP_TRN) ROUNDED(W, I, AP_RND) ROUNDED(W, I, AP_RND_CONV) ROUNDED(W, I, AP_TRN_ZERO) \\
  ROUNDED(W, I, AP_RND_ZERO) ROUNDED(W, I, AP_RND_MIN_INF) ROUNDED(W, I, AP_RND_INF) \\
  run<ap_fixed<W, I, AP_TRN, AP_WRAP_SM>>("1," #W "," #I ",AP_TRN,AP_WRAP_SM");
int main() { FORMAT(5, 3) FORMAT(4, 6) FORMAT(3, -1) }
"""
FORMATS = 3


def headers() -> Path:
    spec = importlib.util.find_spec("hls4ml")
    if spec is None or shutil.which("g++") is None:
        pytest.skip("needs g++ and the ap_types headers that hls4ml ships")
    return Path(spec.submodule_search_locations[0]) / "templates" / "vivado" / "ap_types"


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("ap_fixed")
    (folder / "modes.cpp").write_text(SOURCE)
    command = ["g++", "-std=c++17", "-O0", "-w", f"-I{headers()}", "modes.cpp", "-o", "modes"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    printed = subprocess.run([folder / "modes"], check=True, capture_output=True, text=True).stdout
    return {name: np.array(row, float) for name, *row in (line.split() for line in printed.splitlines())}


def test_the_oracle_equals_ap_fixed(answers):
    assert len(answers) == FORMATS * (len(oracle.ROUNDINGS) * 3 * 2 + 1)
    x = np.arange(-400, 401) / 8
    for name, want in answers.items():
        k, total, integer, rounding, overflow = name.split(",")
        k, f = int(k), int(total) - int(integer)
        modes = dict(rounding=rounding.removeprefix("AP_"), overflow=overflow.removeprefix("AP_"))
        np.testing.assert_array_equal(oracle.quantize(x, k, int(integer) - k, f, **modes), want, name)
