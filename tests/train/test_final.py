"""From a trained state to integers, and back: nothing is lost, and nothing wraps that was not told to."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pquant_jax as pq

F = pq.quantize.Format


@pytest.fixture(scope="module")
def trained(stateful) -> tuple[pq.Transform, pq.Result]:
    compression = stateful.compression()
    return compression, stateful.fit(pq.Plan(1, 3, 1), compression=compression)


def final(trained) -> dict[str, np.ndarray]:
    compression, result = trained
    return pq.finalize(compression, result.state.params, pq.state_of(result.state.opt_state), result.state.model_state)


def both_ways(problem, result: pq.Result, x) -> tuple[np.ndarray, np.ndarray]:
    """Outputs with and without wrapping."""
    encoded = problem.inst.encode(x)
    run = jax.jit(problem.inst.forward, static_argnames="wrap")
    return tuple(np.asarray(run(result.view, result.state.model_state, encoded, wrap=w)[0]) for w in (True, False))


def test_after_calibration_no_sample_wraps(stateful, trained):
    """On what was calibrated, training and validation set; what lies far outside does wrap."""
    _, result = trained
    for part in (stateful.data.train, stateful.data.val):
        wrapping, rounding = both_ways(stateful, result, part.x)
        np.testing.assert_array_equal(wrapping, rounding)
    wrapping, rounding = both_ways(stateful, result, 8 * stateful.data.train.x)
    assert np.mean(wrapping != rounding) > 0.1


def calibrated(f: dict[str, float], start: dict[str, float], x: np.ndarray):
    """Two layers of identity kernels with given f and starting i, calibrated on x."""
    params = {n: {"w": jnp.eye(2)} for n in "ab"}
    inst = pq.instrument(pq.from_function(lambda p, x: (x @ p["a"]["w"]) @ p["b"]["w"], params), x[:1])
    compression = pq.quantize.hgq(inst.sites, beta=0.0)
    tx = pq.optimizer(compression, weights=optax.sgd(0.0))
    state = pq.train.init_state(inst, compression, tx, seed=0)
    bits = state.params.extra["hgq"]
    bits = {**bits, "f": {n: jnp.full_like(v, f.get(n, 8.0)) for n, v in bits["f"].items()}}
    state = state._replace(params=pq.Params(params, {"hgq": bits}))

    def started(inner):
        return inner._replace(i={n: jnp.full_like(v, start.get(n, 2.0)) for n, v in inner.i.items()})

    state = state._replace(opt_state=pq.update_state(state.opt_state, started))
    state = pq.calibrate(inst, compression, state, [x[:1], x[1:]])
    return inst, compression.apply(state.params, pq.state_of(state.opt_state))[0]


def test_calibration_gives_exactly_the_bits_that_are_needed():
    """Minimum and maximum separately, over both arrays: [-1, 0.5] needs no integer bit, [0, 3] two and no sign."""
    x = np.float32([[-1.0, 0.0], [0.5, 3.0]])
    _, view = calibrated({"a/input": 3.0}, {}, x)
    assert view.sites["a/input"].i.tolist() == [0.0, 2.0]
    assert view.sites["a/input"].k.tolist() == [1.0, 0.0]


def test_calibration_wakes_a_dead_site_and_what_follows_it():
    """A site that was decayed to no bit at all passes 0 on; awake, it feeds the next one more than was seen there."""
    x = np.float32([[8.0, -8.0], [24.0, 16.0]])
    inst, view = calibrated({"a/input": -3.0, "b/input": 0.0}, {"a/input": 1.0, "b/input": 0.0}, x)
    np.testing.assert_array_equal(inst.forward(view, {}, x, wrap=False)[0], x)
    np.testing.assert_array_equal(inst.forward(view, {}, x, wrap=True)[0], x)


def test_calibration_leaves_other_modes_alone(plain, assert_same):
    compression = pq.quantize.hgq(plain.inst.sites, beta=0.0, activations=F(2, 4, overflow="SAT"))
    tx = pq.optimizer(compression, weights=optax.sgd(0.1))
    state = pq.train.init_state(plain.inst, compression, tx, seed=0)
    assert_same(pq.calibrate(plain.inst, compression, state, [plain.data.train.x]), state)


def test_codes_are_integers_of_their_format(trained):
    arrays, view = final(trained), trained[1].view
    codes = {name[6:]: v for name, v in arrays.items() if name.startswith("codes/")}
    assert set(codes) == {f"Dense_{n}/{part}" for n in (0, 1) for part in ("kernel", "bias")}
    for path, code in codes.items():
        k, i, f = (np.rint(np.asarray(getattr(view.sites[path], part))) for part in "kif")
        assert code.dtype == np.int32
        assert np.all(code >= -k * 2.0 ** np.maximum(i + f, 0)) and np.all(code <= 2.0 ** np.maximum(i + f, 0) - 1)
        layer, part = path.split("/")
        np.testing.assert_array_equal(np.ldexp(code.astype(np.float64), -arrays[f"f/{path}"]), view.model[layer][part])
    assert any(np.any(v != 0) for v in codes.values())


def test_formats_and_state_are_in_the_file(stateful, trained):
    arrays = final(trained)
    for name in stateful.inst.sites:
        assert {f"{part}/{name}" for part in ("k", "i", "f", "modes")} <= set(arrays)
        assert arrays[f"i/{name}"].dtype == np.int32
    assert arrays["modes/Dense_0/input"].tolist() == ["RND", "WRAP"]
    assert {n for n in arrays if n.startswith("state/")} == {f"state/batch_stats/BatchNorm_0/{s}" for s in ("mean", "var")}
    assert {n for n in arrays if n.startswith("mask/")} == {"mask/Dense_0/kernel", "mask/Dense_1/kernel"}
    assert {n for n in arrays if n.startswith("value/")} == {"value/BatchNorm_0/scale", "value/BatchNorm_0/bias"}


def test_round_trip_gives_the_same_bits(stateful, trained, tmp_path):
    path = tmp_path / "final.npz"
    pq.save_final(path, final(trained))
    view, model_state = pq.load_final(path, stateful.inst)
    _, result = trained
    forward, x = jax.jit(stateful.inst.forward), stateful.inst.encode(stateful.data.test.x)
    np.testing.assert_array_equal(forward(view, model_state, x)[0], forward(result.view, result.state.model_state, x)[0])
    assert float(stateful.inst.ebops(view)) == float(stateful.inst.ebops(result.view))
    assert [p.name for p in tmp_path.iterdir()] == ["final.npz"]  # no temporary file stays


def test_round_trip_of_a_float_model(plain, tmp_path):
    result = plain.fit_float(pq.Plan(1, 0, 0))
    arrays = pq.finalize(pq.identity(), result.state.params, pq.state_of(result.state.opt_state))
    pq.save_final(tmp_path / "float.npz", arrays)
    view, _ = pq.load_final(tmp_path / "float.npz", plain.inst)
    jax.tree.map(np.testing.assert_array_equal, view.model, result.view.model)


@pytest.mark.parametrize("order", ["prune first", "quantize first"])
def test_soft_masks_do_not_corrupt_the_codes(plain, tmp_path, order):
    """A soft mask behind the quantizer takes weights off their grid: an error, never truncated codes."""
    inst = plain.inst
    soft, grid = pq.prune.pdp(sparsity=0.5, temperature=0.5), pq.quantize.fixed(inst.sites, weights=F(1, 4, 1))
    compression = pq.chain(soft, grid) if order == "prune first" else pq.chain(grid, soft)
    params = compression.attach(inst.model.params)
    state = compression.init(params)
    half = dict.fromkeys(state["pdp"].ratio, jnp.float32(0.5))
    state["pdp"] = state["pdp"]._replace(stage=jnp.int32(pq.Stage.TRAIN), ratio=half)
    view, _ = compression.apply(params, state)
    assert np.any((np.asarray(view.masks["a/kernel"]) > 0.01) & (np.asarray(view.masks["a/kernel"]) < 0.99))
    if order == "quantize first":
        with pytest.raises(pq.PQuantError, match=r"a/kernel.*grid"):
            pq.finalize(compression, params, state)
        return
    pq.save_final(tmp_path / "final.npz", pq.finalize(compression, params, state))
    loaded, _ = pq.load_final(tmp_path / "final.npz", inst)
    jax.tree.map(np.testing.assert_array_equal, loaded.model, view.model)


def test_derived_kernel_keeps_its_value(tmp_path):
    """x @ (2 * kernel): the format belongs to the product's operand, not to the parameter."""
    params = {"Dense_0": {"kernel": jnp.asarray([[0.3], [-0.7]], jnp.float32)}}
    inst = pq.instrument(pq.from_function(lambda p, x: x @ (2 * p["Dense_0"]["kernel"]), params), np.zeros((1, 2), np.float32))
    compression = pq.quantize.fixed(inst.sites, weights=F(1, 3, 1), activations=F(3, 3))
    attached = compression.attach(params)
    pq.save_final(tmp_path / "final.npz", pq.finalize(compression, attached, compression.init(attached)))
    view, _ = pq.load_final(tmp_path / "final.npz", inst)
    x = np.float32([[1.0, 0.5]])
    want, _ = inst.forward(compression.apply(attached, compression.init(attached))[0], {}, x)
    np.testing.assert_array_equal(inst.forward(view, {}, x)[0], want)


def written(tmp_path: Path, problem) -> Path:
    compression = pq.quantize.fixed(problem.inst.sites)
    params = compression.attach(problem.inst.model.params)
    pq.save_final(tmp_path / "final.npz", pq.finalize(compression, params, compression.init(params), problem.inst.model.state))
    return tmp_path / "final.npz"


def test_file_of_another_model(plain, stateful, tmp_path):
    path = written(tmp_path, plain)
    with pytest.raises(pq.DataError, match=r"written for another model"):
        pq.load_final(path, stateful.inst)


def test_file_of_another_width(plain, tmp_path):
    """The same names, other shapes: the error comes here, not as a shape error in some layer."""
    path = written(tmp_path, plain)
    wide = {n: {"kernel": jnp.zeros(s), "bias": jnp.zeros(s[1])} for n, s in {"a": (4, 9), "b": (9, 3)}.items()}
    inst = pq.instrument(plain.inst.model._replace(params=wide), plain.data.train.x[:2])
    with pytest.raises(pq.DataError, match=r"a/(kernel|bias).*another model"):
        pq.load_final(path, inst)


def test_file_of_a_model_with_another_site(plain, tmp_path):
    """Its format would be left unread, and this model's own site would run in float."""
    path = written(tmp_path, plain)
    with np.load(path) as data:
        arrays = {n.replace("b/input", "b/input#1"): data[n] for n in data.files}
    pq.save_final(path, arrays)
    with pytest.raises(pq.DataError, match=r"b/input#1.*another model"):
        pq.load_final(path, plain.inst)


def test_file_of_another_format_shape(plain, tmp_path):
    """A format that does not broadcast to its site."""
    path = written(tmp_path, plain)
    with np.load(path) as data:
        arrays = {n: np.zeros(9, np.int32) if n == "i/b/input" else data[n] for n in data.files}
    pq.save_final(path, arrays)
    with pytest.raises(pq.DataError, match=r"'b/input' has shape \(9,\), expected \(8,\).*another model"):
        pq.load_final(path, plain.inst)


@pytest.mark.parametrize("lost", ["f/a/kernel", "modes/b/input"])
def test_damaged_file(plain, tmp_path, lost):
    path = written(tmp_path, plain)
    with np.load(path) as data:
        arrays = {n: data[n] for n in data.files if n != lost}
    pq.save_final(path, arrays)
    with pytest.raises(pq.DataError, match=r"damaged"):
        pq.load_final(path, plain.inst)


def test_file_that_lacks_the_state(stateful, tmp_path):
    path = written(tmp_path, stateful)
    with np.load(path) as data:
        arrays = {n: data[n] for n in data.files if not n.startswith("state/")}
    pq.save_final(path, arrays)
    with pytest.raises(pq.DataError, match=r"batch_stats.*another model"):
        pq.load_final(path, stateful.inst)


def test_file_that_is_none(plain, tmp_path):
    (tmp_path / "final.npz").write_bytes(b"no zip archive")
    for name in ("final.npz", "missing.npz"):
        with pytest.raises(pq.DataError, match=name):
            pq.load_final(tmp_path / name, plain.inst)


def softmax_model():
    def forward(p, x):
        return jax.nn.softmax(x @ p["w"])

    inst = pq.instrument(pq.from_function(forward, {"w": jnp.eye(2)}), np.ones((4, 2), np.float32))
    compression = pq.quantize.fixed(inst.sites, activations=F(i=2, f=4))
    params = compression.attach(inst.model.params)
    return inst, compression, params, compression.init(params)


def test_tables_are_in_the_file_and_come_back(tmp_path):
    inst, compression, params, state = softmax_model()
    arrays = pq.finalize(compression, params, state, inst.model.state, inst=inst)
    pq.save_final(tmp_path / "final.npz", arrays)
    view, _ = pq.load_final(tmp_path / "final.npz", inst)
    built = inst.tables(compression.apply(params, state)[0], inst.model.state)
    assert set(view.tables) == set(built)
    assert len(built) == 2
    for name, table in built.items():
        for mine, theirs in zip(table, view.tables[name], strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("lost", ["codes", "f", "which"])
def test_a_damaged_table(tmp_path, lost):
    inst, compression, params, state = softmax_model()
    arrays = pq.finalize(compression, params, state, inst.model.state, inst=inst)
    name = next(key for key in arrays if key.startswith("table/") and key.endswith(f"/{lost}"))
    pq.save_final(tmp_path / "final.npz", {key: v for key, v in arrays.items() if key != name})
    with pytest.raises(pq.DataError, match=f"the table .* lacks {lost}"):
        pq.load_final(tmp_path / "final.npz", inst)


def test_a_table_of_another_model(tmp_path):
    inst, compression, params, state = softmax_model()
    arrays = pq.finalize(compression, params, state, inst.model.state, inst=inst)
    renamed = {key.replace("reciprocal", "reciprocals") if key.startswith("table/") else key: v for key, v in arrays.items()}
    pq.save_final(tmp_path / "final.npz", renamed)
    with pytest.raises(pq.DataError, match=r"has the table .*reciprocals', which this model lacks"):
        pq.load_final(tmp_path / "final.npz", inst)
