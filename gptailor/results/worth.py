"""What is a model worth in use? Measured speed, memory and bytes of plans, beside the dense base that ran in turns."""

from __future__ import annotations

import pandas as pd

from gptailor.store.queries import RunTables
from gptailor.trial import Measurement, Quantity
from gptailor.wording import count, duration, gigabytes

NAMES = {
    Quantity.DECODE: "Decode speed",
    Quantity.PREFILL: "Prefill speed",
    Quantity.FIRST_TOKEN: "Time to first token",
    Quantity.MEMORY: "Peak memory",
    Quantity.DISK: "Weights on disk",
}
"""What people call a quantity, in the order in which they ask for it."""
MORE_IS_BETTER = (Quantity.DECODE, Quantity.PREFILL)
OF_DENSE = ", x dense"


def amount(quantity: Quantity, value: float) -> str:
    """A quantity with its unit: '61.3 tokens/s', '1 204 tokens/s', '0.25 s', '269 MB'."""
    if quantity in (Quantity.MEMORY, Quantity.DISK):
        return gigabytes(value)
    if quantity is Quantity.FIRST_TOKEN:
        return duration(value)
    return f"{count(value) if value >= 1000 else f'{value:.3g}'} tokens/s"


def title(quantity: Quantity, batch: int) -> str:
    """'Decode speed, batch 8'; what does not depend on the batch does not name it."""
    return NAMES[quantity] if quantity is Quantity.DISK else f"{NAMES[quantity]}, batch {batch}"


def times(ratio: float, spread: float) -> str:
    """A ratio to the dense base: '1.32 ± 0.02 x'."""
    return f"{ratio:.2f} ± {spread:.2f} x"


def line(one: Measurement) -> str:
    """For people, the ratio first: 'Decode speed, batch 1: 1.32 ± 0.02 x dense (61.3 tokens/s beside 46.4) on cpu'."""
    found, dense = amount(one.quantity, one.value), amount(one.quantity, one.dense)
    said = f"{title(one.quantity, one.batch)}: {times(one.ratio, one.ratio_spread)} dense ({found} beside {dense})"
    return f"{said} on {one.device}"


def measured(tables: RunTables) -> pd.DataFrame:
    """The stored measurements in the order of NAMES, a row a plan, device, quantity and batch.

    Columns: as in the store, and `name` (see `title`). Quantities that this version does not know are left out.
    """
    frame = tables.measurements
    frame = frame[frame["quantity"].isin(list(NAMES))]
    order = frame["quantity"].map({quantity: place for place, quantity in enumerate(NAMES)})
    names = [title(Quantity(q), int(b)) for q, b in zip(frame["quantity"], frame["batch"], strict=True)]
    frame = frame.assign(name=pd.Series(names, index=frame.index, dtype=object), order=order.astype(float))
    return frame.sort_values(["device", "subject", "order", "batch"]).drop(columns="order").reset_index(drop=True)


def of_plan(tables: RunTables, config_id: int) -> pd.DataFrame:
    """A plan's measurements for people. Columns: Quantity, Against dense, This plan, Dense base, Device."""
    found = measured(tables)
    own = found[found["config_id"] == config_id]
    rows = [
        (
            row.name_,
            times(row.ratio, row.ratio_spread),
            amount(Quantity(row.quantity), row.value),
            amount(Quantity(row.quantity), row.dense),
            row.device,
        )
        for row in own.rename(columns={"name": "name_"}).itertuples()
    ]
    return pd.DataFrame(rows, columns=["Quantity", "Against dense", "This plan", "Dense base", "Device"])


def ratios(tables: RunTables) -> pd.DataFrame:
    """Ratios to the dense base as columns of plans: a row a config_id (the index).

    Columns: see `axes`, and the same with ` ±`; where several devices measured a plan, the last one counts.
    """
    found = measured(tables).dropna(subset=["config_id"]).sort_values("measured_at")
    found = found.assign(column=found["name"] + OF_DENSE)
    wide = found.pivot_table(index="config_id", columns="column", values="ratio", aggfunc="last")
    spread = found.pivot_table(index="config_id", columns="column", values="ratio_spread", aggfunc="last")
    return wide.join(spread.rename(columns=lambda name: f"{name} ±"))


def axes(tables: RunTables) -> list[tuple[str, Quantity]]:
    """What plans can be compared by: the columns of `ratios`, and the quantity that each is of."""
    found = measured(tables).dropna(subset=["config_id"]).drop_duplicates("name")
    return [(f"{name}{OF_DENSE}", Quantity(q)) for name, q in zip(found["name"], found["quantity"], strict=True)]
