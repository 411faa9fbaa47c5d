"""The dumps beside this file: models of XGBoost and LightGBM on the first 2,000 jets, and what the libraries answer.

    python tests/trees/make_dumps.py

Needs both packages; the tests of the readers don't.  Written with XGBoost 3.2.0 and LightGBM 4.7.0.
"""

from __future__ import annotations

import json
from pathlib import Path

import lightgbm
import numpy as np
import xgboost

import pquant_jax as pq

HERE = Path(__file__).parent


def main() -> None:
    data = pq.data.jets(2000)
    x, y = data.train.x, data.train.y
    test = np.concatenate([data.test.x[:100], np.float32(np.random.default_rng(0).normal(0, 4, (100, 16)))])
    margins = {}
    for name, classes in (("xgboost_5", y), ("xgboost_2", y == 3)):
        model = xgboost.XGBClassifier(n_estimators=2, max_depth=3, learning_rate=0.5, random_state=0).fit(x, classes.astype(int))
        model.get_booster().save_model(HERE / f"{name}.json")
        if name == "xgboost_5":
            model.get_booster().dump_model(HERE / f"{name}_dump.json", dump_format="json")
            model.get_booster().save_model(HERE / f"{name}.ubj")
        margins[name] = model.get_booster().predict(xgboost.DMatrix(test), output_margin=True)
    for name, classes in (("lightgbm_5", y), ("lightgbm_2", y == 3)):
        model = lightgbm.LGBMClassifier(n_estimators=2, num_leaves=7, learning_rate=0.5, verbose=-1, random_state=0)
        model.fit(x, classes.astype(int))
        model.booster_.save_model(HERE / f"{name}.txt")
        if name == "lightgbm_5":
            (HERE / f"{name}.json").write_text(json.dumps(model.booster_.dump_model()))
        margins[name] = model.booster_.predict(test, raw_score=True)
    np.savez_compressed(HERE / "margins.npz", x=test, **margins)


if __name__ == "__main__":
    main()
