"""Which plan is best, what the front is, how much is kept: one answer each, for pages, commands, reports, experiments.

Two kinds of scores are kept apart. *Searched* ones are the search's own, on the objectives at the full budget; they
flatter, since the best of many is in part the luckiest. *Judged* ones are of evaluations outside the search: on the
selection split, which may choose another plan than the search's scores would, and on what is held out.

Averages of scores weigh every benchmark alike, and are of those alone whose scores are shares of examples: a
perplexity, an F1 or a BLEU has a unit of its own. Retention is averaged over the same ones: a perplexity half as good
is no model half as able. Where no score is a share, retentions of all are averaged. What leaves out the
benchmarks that the search was calibrated on does so whatever the split and the shots: a plan may have learnt their
form. Retention above chance counts from the score of guessing, because a coin's half is no capability.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from gptailor import measures
from gptailor.measures import gain, retention
from gptailor.plan import BASE, StitchPlan
from gptailor.store.queries import ScoreTables
from gptailor.trial import (
    DENSE,
    SIZE,
    BenchmarkKey,
    Subject,
    SubjectKind,
    TrialStatus,
    averaged_together,
    is_share,
)

BENCHMARK = ["benchmark", "metric", "split"]


def ended(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials that are done: with a score, or crashed. One that was given up in a stop is run again."""
    return trials[trials["status"].isin([TrialStatus.SUCCESS, TrialStatus.CRASHED])]


def judged(tables: ScoreTables, asked: str = "held_out") -> pd.DataFrame:
    """A row a subject and benchmark of the run file's `asked` list, each at the most examples it was scored on.

    Columns: subject, config_id, plan_hash, benchmark, metric, split, n, score, stderr, higher, chance, calibrated (the
    search looked at this benchmark), dense (its score on as many examples), retention, above_chance (retention counted
    from the score of guessing; NaN where the dense model does not beat it by two standard errors), aggregation (how the
    score joins its items; None where that was not stored), share (the benchmark's scores are shares of examples).
    """
    found = _evaluations(tables, asked)
    found = found.sort_values("n_samples").drop_duplicates(["subject", *BENCHMARK], keep="last")
    searched = {one.task for one in tables.spec.objectives}
    calibrated = {one.benchmark for one in getattr(tables.spec, asked) if one.task in searched}
    frame = pd.DataFrame(
        {
            "subject": found["subject"].astype(str),
            "config_id": found["config_id"],
            "plan_hash": [_hash(row, tables) for row in found.itertuples()],
            **{column: found[column].astype(str) for column in BENCHMARK},
            "n": found["n_samples"].astype(int),
            "score": found["score"].astype(float),
            "stderr": found["stderr"].astype(float),
            "higher": found["higher_is_better"].astype(bool),
            "chance": found["chance"].astype(float),
            "calibrated": found["benchmark"].isin(calibrated),
            "aggregation": found["aggregation"].astype(object),
        }
    )
    frame["share"] = _is_share(frame)
    dense, error = _dense(tables), _dense(tables, "stderr")
    keys = [tuple(key) for key in frame[[*BENCHMARK, "n"]].itertuples(index=False)]
    frame["dense"] = pd.Series([dense.get(key) for key in keys], index=frame.index, dtype=float)
    noise = pd.Series([error.get(key) for key in keys], index=frame.index, dtype=float).fillna(0.0)
    kept = [retention(s, d, h) for s, d, h in zip(frame["score"], frame["dense"], frame["higher"], strict=True)]
    frame["retention"] = pd.Series(kept, index=frame.index, dtype=float)
    beats = frame["dense"] - frame["chance"] > 2 * noise
    above = (frame["score"] - frame["chance"]) / (frame["dense"] - frame["chance"])
    frame["above_chance"] = above.where(beats & frame["higher"])
    kind = kinds(frame["subject"]).map(list(SubjectKind).index).astype(int)
    return (
        frame.assign(kind=kind).sort_values(["kind", "subject", *BENCHMARK]).drop(columns="kind").reset_index(drop=True)
    )


def averages(frame: pd.DataFrame, calibration: Mapping[Subject, float] | None = None) -> pd.DataFrame:
    """A row a subject that was scored on every benchmark of `frame` (see `judged`), in its order.

    Columns: subject, config_id, plan_hash, benchmarks, averaged (how many of them are shares), average (of these; NaN
    without any), stderr, without_calibration (the same without benchmarks that the search looked at; NaN if none is
    left), retention (of the same; of all where no score is a share), above_chance (likewise), gap (calibration
    retention less held-out retention: what the search's own scores promise too much).
    calibration: subject -> mean retention over the objectives at the full budget.
    """
    columns = ["subject", "config_id", "plan_hash", "benchmarks", "averaged", "average", "stderr"]
    columns += ["without_calibration", "retention", "above_chance", "gap"]
    n_benchmarks = len(frame[BENCHMARK].drop_duplicates())
    rows = []
    for subject, own in frame.groupby("subject", sort=False):
        if len(own) < n_benchmarks:
            continue
        shares = own[own["share"]]
        averaged = shares if len(shares) else own  # one unit, or else ratios alone
        errors = float(np.sqrt((shares["stderr"] ** 2).sum(skipna=False)) / len(shares)) if len(shares) else np.nan
        kept = averaged["retention"].mean() if averaged["retention"].notna().all() else np.nan
        rows.append(
            (
                subject,
                own["config_id"].iloc[0],
                own["plan_hash"].iloc[0],
                n_benchmarks,
                len(shares),
                shares["score"].mean(),
                errors,
                shares.loc[~shares["calibrated"], "score"].mean(),
                kept,
                averaged["above_chance"].mean(),
                (calibration or {}).get(Subject.parse(str(subject)), np.nan) - kept,
            )
        )
    return pd.DataFrame(rows, columns=columns)


@dataclass(frozen=True)
class Searched:
    """What the search's own scores say of the plans that succeeded at one budget, in every objective.

    rows: the stored scores, with config_id, `name` (`benchmark/metric`) and kept. The others are frames of a row
    a configuration (index: config_id, ascending) and a column an objective's name.
    scores: as lm-eval gives them; rising: turned so that more is better, by their sign; gains: see measures.gain;
    kept: retention, NaN where the dense model's score is not known. size: the share of the base's layers that each
    plan keeps, where the run asks for a range of sizes: an objective then, like the others, in the front, its knee and
    the hypervolume; not in the average.
    """

    rows: pd.DataFrame
    scores: pd.DataFrame
    rising: pd.DataFrame
    gains: pd.DataFrame
    kept: pd.DataFrame
    size: pd.Series | None = None

    @cached_property
    def is_share(self) -> bool:
        """Whether every plan's retention is known in every objective, so that plans are ranked by it."""
        return bool(self.kept.notna().to_numpy().all())

    @cached_property
    def average(self) -> pd.Series:
        """What plans are ranked by: the mean retention, or, where the dense model was not scored, the mean gain.

        Those are averaged whose scores are shares of examples (trial.averaged_together).
        """
        frame = (self.kept if self.is_share else self.gains)[self.averaged]
        return frame.astype(float).mean(axis=1, skipna=False)

    @cached_property
    def averaged(self) -> list[str]:
        """The objectives whose scores make one average."""
        return [name for name in map(str, self.gains.columns) if name in _together(self.rows)]

    @cached_property
    def front(self) -> list[int]:
        """config_id of the plans that no other plan beats in every objective, best average first."""
        if self.scores.empty:
            return []
        on_front = self.average[measures.pareto_front(self._points)]
        return [int(config_id) for config_id in on_front.sort_values(ascending=False, kind="stable").index]

    @cached_property
    def knee(self) -> int | None:
        """config_id of the front's knee."""
        bend = measures.knee(self._points) if len(self.rising) else None
        return None if bend is None else int(self.rising.index[bend])

    @cached_property
    def hypervolume(self) -> float | None:
        """Of the gains, from the corner 0; None without a plan, and with too many objectives.

        The gain in size is the share of the layers that is gone.
        """
        if not len(self.gains):
            return None
        points = self.gains if self.size is None else self.gains.assign(**{SIZE: 1.0 - self.size})
        return measures.hypervolume(points.to_numpy(float), [0.0] * points.shape[1])

    @cached_property
    def _points(self) -> np.ndarray:
        """What plans are compared by, more being better: [plans, objectives], size among them."""
        points = self.rising if self.size is None else self.rising.assign(**{SIZE: -self.size})
        return points.to_numpy(float)


def searched(tables: ScoreTables, budget: int | None = None) -> Searched:
    """The search's own scores at a budget (by default the full one): each configuration's last success there."""
    budget = tables.spec.budget.max if budget is None else budget
    names = [f"{benchmark}/{metric}" for benchmark, metric, _ in _asked(tables, "objectives")]
    done = tables.trials[(tables.trials["status"] == "success") & (tables.trials["budget"] == budget)]
    done = done.sort_values("ended_at", kind="stable").drop_duplicates("config_id", keep="last")
    rows = tables.scores[tables.scores["is_objective"].astype(bool)]
    rows = rows.merge(done[["trial_id", "config_id"]], on="trial_id").pipe(_named)
    rows = rows[rows["name"].isin(names)]
    higher = rows["higher_is_better"].astype(bool)
    rows = rows.assign(
        kept=kept(rows, tables),
        gains=[gain(s, h) for s, h in zip(rows["score"], higher, strict=True)],
        rising=rows["score"].astype(float) * np.where(higher, 1.0, -1.0),
    )
    wide = {c: rows.pivot(index="config_id", columns="name", values=c) for c in ("score", "rising", "gains", "kept")}
    whole = wide["score"].reindex(columns=names).dropna().index
    frames = [frame.reindex(index=whole, columns=names).astype(float) for frame in wide.values()]
    size = tables.kept_layers.reindex(whole) / int(tables.runs["n_layers"].iloc[0]) if tables.spec.has_range else None
    score, rising, gains, share = frames
    return Searched(rows[rows["config_id"].isin(whole)], score, rising, gains, share, size)


def kept(rows: pd.DataFrame, tables: ScoreTables) -> np.ndarray:
    """Retention of each of `rows` (benchmark, metric, n_samples, score, higher_is_better) of the objectives' splits.

    Against the dense model on as many examples, or, where it was not scored on so many, on the most; NaN without.
    """
    rows, dense = _named(rows), dense_scores(tables)
    most = dict(zip(dense["name"], dense["score"], strict=True))
    exact = dict(zip(zip(dense["name"], dense["n_samples"], strict=True), dense["score"], strict=True))
    columns = (rows[c] for c in ("name", "n_samples", "score", "higher_is_better"))
    shares = (
        None if (whole := exact.get((name, n), most.get(name))) is None else retention(score, whole, bool(higher))
        for name, n, score, higher in zip(*columns, strict=True)
    )
    return np.array([np.nan if share is None else share for share in shares], dtype=float)


def dense_scores(tables: ScoreTables) -> pd.DataFrame:
    """The dense model's scores of the objectives on the splits they are searched on.

    Columns: name (`benchmark/metric`), n_samples (ascending), score.
    """
    found = _named(_evaluations(tables, "objectives"))
    found = found[(found["subject"] == str(DENSE)) & (found["score"] > 0)]
    return found.sort_values("n_samples")[["name", "n_samples", "score"]]


def calibration(tables: ScoreTables, plans: Searched | None = None) -> dict[Subject, float]:
    """Subject -> mean retention over the objectives at the full budget: what the search believed.

    Of objectives whose scores are averaged together. Configurations from their trials, others (repaired plans too,
    which have none) from the reference scores. plans: `searched`, where it is known.
    """
    found = _evaluations(tables, "objectives").pipe(_named)
    found = found.sort_values("n_samples").drop_duplicates(["subject", *BENCHMARK], keep="last")
    together = _together(found)
    found = found[found["name"].isin(together)]
    shares = found.assign(kept=kept(found, tables)).dropna(subset="kept").groupby("subject")["kept"]
    references = {
        Subject.parse(str(subject)): float(own.mean()) for subject, own in shares if len(own) == len(together)
    }
    plans = plans or searched(tables)
    believed = plans.kept.dropna()[plans.averaged].mean(axis=1)
    return references | {Subject.config(int(str(i))): float(own) for i, own in believed.items()}


def _together(rows: pd.DataFrame) -> set[str]:
    """Names of the objectives, of `rows` of their scores, that make one average."""
    known = rows.drop_duplicates("name")
    asked = list(zip(known["metric"].astype(str), known["higher_is_better"].astype(bool), strict=True))
    return {str(known["name"].iloc[place]) for place in averaged_together(asked)}


def best(tables: ScoreTables, found: Searched | None = None) -> Subject | None:
    """The configuration whose plan the run calls its best: the selection's choice, else the search's own.

    That is the plan of the highest average by the search's scores, whatever its size (`best_of_sizes` has one for
    each). None before a plan was scored at the full budget.
    found: `searched`, where it is known.
    """
    if chosen := choice(tables, found):
        return chosen.subject
    average = (found or searched(tables)).average
    return Subject.config(int(average.idxmax())) if len(average) else None


def best_of_sizes(tables: ScoreTables, found: Searched | None = None) -> pd.DataFrame:
    """The best plan of each size, the longest first; empty where the run does not ask for a range of sizes.

    Chosen among the plans of a size as `best` chooses among all: by the selection split where any of them was judged
    there, else by the search's own scores.

    Columns: kept_layers, config_id, average (what the search's own scores rank by), selection (retention on the
    selection split; NaN where it was not used).
    """
    columns = ["kept_layers", "config_id", "average", "selection"]
    if not tables.spec.has_range:
        return pd.DataFrame(columns=columns)
    found = found or searched(tables)
    rows = pd.DataFrame({"config_id": found.average.index, "average": found.average.to_numpy(float)})
    rows = rows.astype({"config_id": int}).assign(selection=np.nan)
    if _asked(tables, "selection"):
        known = calibration(tables, found)
        judged_there = of_kind(averages(judged(tables, "selection"), known), SubjectKind.CONFIG)
        judged_there = judged_there.dropna(subset=["retention", "gap"]).assign(
            average=lambda own: own["subject"].map(lambda subject: known[Subject.parse(subject)]),
            selection=lambda own: own["retention"],
        )
        plain = rows[~rows["config_id"].isin(judged_there["config_id"])]
        rows = pd.concat([judged_there[["config_id", "average", "selection"]], plain], ignore_index=True)
    rows = rows.assign(kept_layers=rows["config_id"].map(tables.kept_layers)).dropna(subset=["kept_layers", "average"])
    order = ["kept_layers", "selection", "average"]
    best_first = rows.sort_values(order, ascending=False, na_position="last", kind="stable")
    return (
        best_first.drop_duplicates("kept_layers")[columns]
        .astype({"kept_layers": int, "config_id": int})
        .reset_index(drop=True)
    )


@dataclass(frozen=True)
class Choice:
    """The plan chosen by the selection split.

    retention: its mean there; promised: what the search's own scores said of it. by_search: the plan that those would
    have chosen, and its retention on the selection split. optimism: mean over the finalists of promised less kept: how
    much the search's scores flatter.
    """

    subject: Subject
    retention: float
    promised: float
    by_search: Subject
    by_search_retention: float
    optimism: float
    finalists: int


def choice(tables: ScoreTables, found: Searched | None = None) -> Choice | None:
    """What the selection split chose; None where it has not been used. found: `searched`, where it is known."""
    if not _asked(tables, "selection"):
        return None
    known = calibration(tables, found)
    table = averages(judged(tables, "selection"), known)
    plans = of_kind(table, SubjectKind.CONFIG).dropna(subset=["retention", "gap"])
    if plans.empty:
        return None
    promised = plans["subject"].map(lambda subject: known[Subject.parse(subject)])
    best, believed = plans.loc[plans["retention"].idxmax()], plans.loc[promised.idxmax()]
    return Choice(
        subject=Subject.parse(str(best["subject"])),
        retention=float(best["retention"]),
        promised=float(promised[best.name]),
        by_search=Subject.parse(str(believed["subject"])),
        by_search_retention=float(believed["retention"]),
        optimism=float(plans["gap"].mean()),
        finalists=len(plans),
    )


def plan_name(subject: Subject) -> str:
    """`plan 12`, or `plan 12, repaired,` of the subject of a configuration."""
    name = f"p{subject.label[1:]}"
    return f"{name}," if "," in name else name


def choice_text(chosen: Choice) -> str:
    """One sentence or two for people."""
    name = plan_name(chosen.subject)
    text = (
        f"Of the {chosen.finalists} most promising plans, {name} is best on the selection split, which the search "
        f"never used: it keeps {chosen.retention:.1%} of the dense base there ({chosen.promised:.1%} by the search's "
        "own scores)."
    )
    if chosen.by_search != chosen.subject:
        other = plan_name(chosen.by_search)
        text += f" The search's scores would have chosen {other}, which keeps {chosen.by_search_retention:.1%}."
    beside = "more" if chosen.optimism >= 0 else "less"
    return text + f" On average the search's scores promised {abs(chosen.optimism):.1%} {beside} than was kept."


def judged_best(table: pd.DataFrame, best: Subject | None) -> Subject | None:
    """The run's best plan (`best`), where it stands in `averages`: it is not picked by what is held out."""
    return best if str(best) in set(table["subject"]) else None


def on_objectives(tables: ScoreTables, subject: Subject) -> pd.DataFrame:
    """A subject's evaluations on the objectives, each at the most examples; `name`: `benchmark/metric`."""
    found = _evaluations(tables, "objectives").pipe(_named)
    found = found[found["subject"] == str(subject)]
    return found.sort_values("n_samples").drop_duplicates("name", keep="last")


def strongest(table: pd.DataFrame, kind: SubjectKind) -> Subject | None:
    """The rival of a kind (baseline, candidate) with the highest average in `averages`.

    By retention where no scores can be averaged. The run's own plan is not picked so, see `best`.
    """
    own = of_kind(table, kind)
    ranked = own.sort_values(["average", "retention"], na_position="first")
    return None if own.empty else Subject.parse(str(ranked["subject"].iloc[-1]))


def of_kind(table: pd.DataFrame, kind: SubjectKind) -> pd.DataFrame:
    """The rows of a table whose column `subject` is of a kind."""
    return table[kinds(table["subject"]) == kind]


def kinds(subjects: pd.Series) -> pd.Series:
    """Texts of subjects -> their SubjectKind."""
    return subjects.map(lambda text: Subject.parse(str(text)).kind).astype(object)


def _is_share(frame: pd.DataFrame) -> pd.Series:
    """By benchmark: whether everybody's score is a share of examples."""
    own = [
        is_share(row.metric, row.higher, row.aggregation) and 0 <= row.score <= 1
        for row in frame[["metric", "higher", "aggregation", "score"]].itertuples()
    ]
    alone = pd.Series(own, index=frame.index, dtype=bool)
    return alone.groupby([frame[column] for column in BENCHMARK]).transform("all").astype(bool)


def _hash(row: Any, tables: ScoreTables) -> str | None:
    """The plan behind an evaluation; rows that older versions wrote do not name it."""
    if isinstance(row.plan_hash, str):
        return row.plan_hash
    n_layers = int(tables.runs["n_layers"].iloc[0])
    subject = Subject.parse(row.subject)
    match subject.kind:
        case SubjectKind.CONFIG:
            found = tables.plans.loc[tables.plans["config_id"] == subject.config_id, "plan_hash"]
            return None if found.empty else str(found.iloc[0])
        case SubjectKind.BASELINE:
            return None
        case _:
            return StitchPlan.dense(n_layers, subject.name or BASE).hash


def _dense(tables: ScoreTables, column: str = "score") -> dict[tuple[Any, ...], float]:
    """(benchmark, metric, split, examples) -> the dense model's score, or its standard error."""
    own = tables.evaluations[tables.evaluations["subject"] == str(DENSE)]
    return dict(zip(zip(*(own[c] for c in (*BENCHMARK, "n_samples")), strict=True), own[column], strict=True))


def _named(rows: pd.DataFrame) -> pd.DataFrame:
    """With `name`: benchmark/metric."""
    return rows.assign(name=rows["benchmark"].astype(str) + "/" + rows["metric"].astype(str))


def _evaluations(tables: ScoreTables, asked: str) -> pd.DataFrame:
    """Those on the benchmarks of one of the run file's lists."""
    wanted, found = _asked(tables, asked), tables.evaluations
    keys = zip(*(found[column] for column in BENCHMARK), strict=True)
    return found[np.array([key in wanted for key in keys], dtype=bool)]


def _asked(tables: ScoreTables, key: str) -> list[BenchmarkKey]:
    """Each that the run file lists under `objectives`, `selection` or `held_out`."""
    return [one.key for one in getattr(tables.spec, key)]
