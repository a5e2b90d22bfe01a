"""Candidates, scores and preferences as Parquet: what a round saw and chose, for people and for later rounds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raylign.files import publish_file
from raylign.records import Candidate, KlSample, Preference, Prompt, Score

_CANDIDATES = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("index", pa.int32()),
        ("messages", pa.string()),
        ("text", pa.string()),
        ("score", pa.float64()),
        ("score_parts", pa.string()),
        ("score_reason", pa.string()),
        ("finish_reason", pa.string()),
        ("policy_version", pa.int64()),
        ("seed", pa.int64()),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
    ]
)
_PREFERENCES = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("messages", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("scores", pa.list_(pa.float64())),
        ("weights", pa.list_(pa.float64())),
        ("reference_logps", pa.list_(pa.float64())),
        ("indices", pa.list_(pa.int32())),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.list_(pa.int32()))),
        ("kl_prompt_token_ids", pa.list_(pa.int32())),
        ("kl_token_ids", pa.list_(pa.int32())),
        ("kl_sampler_logp", pa.float64()),
        ("kl_reference_logp", pa.float64()),
    ]
)


def write_candidates(
    path: Path, prompts: Sequence[Prompt], candidates: Sequence[Candidate], scores: Sequence[Score]
) -> None:
    """One row per candidate with its score; a null score is unscored. `messages` is the prompt as JSON."""
    messages = {prompt.id: _json(prompt.messages) for prompt in prompts}
    rows = [
        {
            "prompt_id": candidate.prompt_id,
            "index": candidate.index,
            "messages": messages[candidate.prompt_id],
            "text": _storable(candidate.text),
            "score": score.value,
            "score_parts": _json(dict(score.parts)),
            "score_reason": _storable(score.reason),
            "finish_reason": candidate.finish_reason,
            "policy_version": candidate.policy_version,
            "seed": candidate.seed,
            "token_ids": candidate.token_ids,
            "logprobs": candidate.logprobs,
        }
        for candidate, score in zip(candidates, scores, strict=True)
    ]
    _write(path, rows, _CANDIDATES)


def read_candidates(path: Path) -> tuple[list[Candidate], list[Score]]:
    """What `write_candidates` wrote, in its order; texts have replacements where UTF-8 could not hold them."""
    candidates, scores = [], []
    for row in pq.read_table(path).to_pylist():
        candidates.append(
            Candidate(
                prompt_id=row["prompt_id"],
                index=row["index"],
                token_ids=tuple(row["token_ids"]),
                logprobs=tuple(row["logprobs"]),
                text=row["text"],
                finish_reason=row["finish_reason"],
                policy_version=row["policy_version"],
                seed=row["seed"],
            )
        )
        scores.append(Score(row["score"], json.loads(row["score_parts"]), row["score_reason"]))
    return candidates, scores


def read_preferences(path: Path, prompts: Sequence[Prompt], candidates: Sequence[Candidate]) -> tuple[Preference, ...]:
    """What `write_preferences` wrote of these prompts and candidates."""
    by_id = {prompt.id: prompt for prompt in prompts}
    by_place = {(candidate.prompt_id, candidate.index): candidate for candidate in candidates}
    return tuple(
        Preference(
            prompt=by_id[row["prompt_id"]],
            candidates=tuple(by_place[row["prompt_id"], index] for index in row["indices"]),
            scores=tuple(row["scores"]),
            weights=tuple(row["weights"]),
            reference_logps=tuple(row["reference_logps"]),
            kl_sample=_kl_sample(row),
        )
        for row in pq.read_table(path).to_pylist()
    )


def write_preferences(path: Path, preferences: Sequence[Preference]) -> None:
    """One row per preference, candidates best..worst; `chosen` and `rejected` are the texts of the ends.

    The columns `kl_*` are null where the loss asks for no KL sample.
    """
    rows = [
        {
            "prompt_id": preference.prompt.id,
            "messages": _json(preference.prompt.messages),
            "chosen": _storable(preference.candidates[0].text),
            "rejected": _storable(preference.candidates[-1].text),
            "scores": preference.scores,
            "weights": preference.weights,
            "reference_logps": preference.reference_logps,
            "indices": [candidate.index for candidate in preference.candidates],
            "prompt_token_ids": preference.prompt.token_ids,
            "token_ids": [candidate.token_ids for candidate in preference.candidates],
        }
        | (
            {f"kl_{name}": value for name, value in asdict(preference.kl_sample).items()}
            if preference.kl_sample
            else {}
        )
        for preference in preferences
    ]
    _write(path, rows, _PREFERENCES)


def _kl_sample(row: Mapping[str, Any]) -> KlSample | None:
    if row.get("kl_token_ids") is None:
        return None
    prompt, tokens = tuple(row["kl_prompt_token_ids"]), tuple(row["kl_token_ids"])
    return KlSample(prompt, tokens, row["kl_sampler_logp"], row["kl_reference_logp"])


def _write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    publish_file(path, lambda temporary: pq.write_table(pa.Table.from_pylist(rows, schema), temporary))


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=True)


def _storable(text: str) -> str:
    """Half a surrogate pair, which a byte-level tokenizer can emit, has no UTF-8 form."""
    return text.encode("utf-8", "replace").decode()
