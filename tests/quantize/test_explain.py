"""The table of sites says what is in force, and the template gives the quantizer back."""

from __future__ import annotations

import chex
import jax.numpy as jnp
import pytest
import yaml

import pquant_jax as pq
from pquant_jax import config
from pquant_jax.quantize import Format, dynamic, fixed, hgq

MORE = {
    "a/gelu/input": pq.SiteSpec((3,), "input", max_bits=12),
    "a/gelu/table": pq.SiteSpec((3,), "table", signed=False),
    "add.1": pq.SiteSpec((2,), "input", format=Format(i=0, f=4.5, overflow="SAT", granularity=(0,))),
    "addx1": pq.SiteSpec((2,), "input"),
    "a/input#1": pq.SiteSpec((3,), "input", signed=False),
    "output": pq.SiteSpec((2,), "output"),
}


@pytest.fixture
def inst(model):
    linear = pq.from_function(lambda p, x: x @ p["a"]["kernel"] + p["a"]["bias"], model)
    made = pq.instrument(linear, jnp.ones((1, 4)))
    return made._replace(sites={**made.sites, **MORE})


@pytest.mark.parametrize("method", ["hgq", "fixed", "dynamic"])
def test_the_template_is_the_quantizer(method, inst):
    text = pq.template(inst, method)
    ours = config.quantizer(text, inst)
    own = {
        "hgq": lambda: hgq(inst.sites, cost=inst.ebops),
        "fixed": lambda: fixed(inst.sites),
        "dynamic": lambda: dynamic(inst.sites),
    }
    want = own[method]()
    params = want.attach(inst.model.params)
    chex.assert_trees_all_equal(ours.attach(inst.model.params), params)
    chex.assert_trees_all_equal(ours.init(params), want.init(params))
    chex.assert_trees_all_equal(ours.apply(params, want.init(params))[0], want.apply(params, want.init(params))[0])
    assert {c.source for c in ours.formats.values()} != {c.source for c in want.formats.values()}
    section = yaml.safe_load(text)
    assert section.keys() == {"method", "rules"} and len(section["rules"]) == len(inst.sites)
    assert config.parse({"quantization": section}).quantization.method == method


def test_an_edited_template_changes_that_site(inst):
    text = pq.template(inst, "fixed").replace("{where: a/kernel, i: 0, f: 7", "{where: a/kernel, i: 0, f: 2")
    t = config.quantizer(text, inst)
    params = t.attach(inst.model.params)
    sites = t.apply(params, t.init(params))[0].sites
    assert float(sites["a/kernel"].f.max()) == 2 and float(sites["a/bias"].f.max()) == 7


def test_the_table_has_every_site_and_why(inst):
    rules = [("a/kernel", {"f": 4.0}), (pq.quantize.of_kind("table"), {"trainable": False})]
    rows = {line.split()[0]: line for line in pq.explain(inst, hgq(inst.sites, rules=rules)).splitlines()}
    assert rows.keys() == {"site", *inst.sites}
    assert rows["a/kernel"].split() == [
        "a/kernel", "(4,", "3)", "kernel", "1", "2", "4", "RND", "SAT_SYM", "element", "i,", "f", "rule", "'a/kernel'",
    ]  # fmt: skip
    assert "f; i follows the range" in rows["a/input"] and "default for input" in rows["a/input"]
    assert "  12  " in rows["a/gelu/input"] and "the model's own format" in rows["add.1"] and "(0,)" in rows["add.1"]
    moves = pq.explain(inst, hgq(inst.sites, rules=rules)).splitlines()[0].index("moves")
    assert rows["a/gelu/table"][moves:].split() == ["rule", "'kind", "table'"], "nothing moves"


def test_a_chain_is_explained_and_a_site_without_a_quantizer_says_so(inst):
    whole = pq.explain(inst, pq.chain(pq.prune.dst(alpha=1e-6), fixed(inst.sites)))
    assert whole == pq.explain(inst.sites, fixed(inst.sites))
    assert pq.explain(inst, pq.identity()).count("no quantizer: float") == len(inst.sites)


def test_unknown_quantizers_and_bad_sections(inst):
    with pytest.raises(pq.TransformError, match="quantizer is 'fixd'; did you mean 'fixed'"):
        pq.template(inst, "fixd")
    with pytest.raises(pq.ConfigError, match="unknown key 'quantization.weigths'"):
        config.quantizer("{method: fixed, weigths: {f: 1}}", inst)
    with pytest.raises(pq.ConfigError, match="the quantizer, line 1"):
        config.quantizer("{method: [", inst)
    with pytest.raises(pq.ConfigError, match="section is empty"):
        config.quantizer("", inst)
