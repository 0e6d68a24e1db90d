"""Group the targets of a DataFrame with an estimator of scikit-learn.

    python examples/estimator.py

The script needs pandas and the extra `tables`. It generates a table of greenhouses: numbers, a category, a date
and missing values. Three targets depend on light and season, three others on soil and water. They are numbers,
classes and flags, and some labels are missing. The encoder is a small MLP, which trains in less than a minute. The
default encoder, TabM, takes several minutes for this table.
"""

import numpy as np
import pandas as pd
from sklearn.model_selection import train_test_split

from dmtg_core.sklearn import GroupedEstimator


def greenhouses(rows: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Generate features and targets."""
    rng = np.random.default_rng(0)
    days = rng.integers(0, 365, rows)
    x = pd.DataFrame(
        {
            "light": rng.gamma(4.0, 100.0, rows),
            "sown": pd.Timestamp("2025-01-01") + pd.to_timedelta(days, "D"),
            "soil": rng.choice(["clay", "loam", "sand"], rows),
            "water": rng.normal(20.0, 5.0, rows),
        }
    )
    season = np.sin(2 * np.pi * days / 365)
    sun = (x["light"] - 400) / 200 * season
    damp = (x["water"] - 20) / 5 * x["soil"].map({"clay": 1.0, "loam": 0.2, "sand": -1.0})
    y = pd.DataFrame(
        {
            "height": 30 + 8 * sun + rng.normal(size=rows),
            "flowering": np.where(sun + season > 0, "early", "late"),
            "ripe": sun - season > 0,
            "yield": 5 + damp + 0.2 * rng.normal(size=rows),
            "mould": damp > 0.5,
            "roots": pd.cut(damp, [-np.inf, -0.4, 0.4, np.inf], labels=["flat", "mixed", "deep"]),
        }
    )
    x.loc[rng.random(rows) < 0.1, "light"] = np.nan
    return x, y.mask(rng.random(y.shape) < 0.1)


def main(rows: int = 1500, **options: object) -> None:
    """Fit the estimator, and print the groups and the scores."""
    x, y = greenhouses(rows)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.25, random_state=0)
    given = {"groups": 2, "encoder": "mlp", "encoder_options": {"widths": [64, 32]}, "random_state": 0}
    model = GroupedEstimator(**{**given, **options}).fit(x_train, y_train)
    for names in model.groups_:
        print(", ".join(f"{name} ({model.kinds_[name]})" for name in names))
    print(f"score: {model.score(x_test, y_test):.3f}")
    print(model.predict(x_test.head(3)))


if __name__ == "__main__":
    main()
