"""A run over fakes whose scorer asks people, and a person who answers through MLflow's API."""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mlflow.entities import AssessmentSource, AssessmentSourceType, Feedback
from mlflow.genai.review_queues import ReviewStatus
from mlflow.tracing.client import TracingClient
from mlflow.tracking import MlflowClient
from rich.console import Console

from actors.weight_sync.folder import OneNode
from actors.weight_sync.publish import Canary, WeightPublisher
from actors.weight_sync.transports import ShmTransport
from raylign.config import OnlineDpoConfig, parse_config
from raylign.config.scoring import CompositionBlock, ScoringBlock
from raylign.prompts import PromptSet
from raylign.records import Candidate, Prompt, Score
from raylign.review.waiting import require_answers
from raylign.run.directory import continue_or_create
from raylign.scoring.base import ItemScorer, ScoringItem
from raylign.scoring.composition import composed
from raylign.tracking.review_queue import WHICH, WHY
from raylign.tracking.tracker import open_tracker
from recipes.online_dpo import train
from recipes.run import Run, recorded
from tests.fakes import WEIGHT, FakeEngine, FakeGenerators, FakeRank, FakeScorer, FakeTeam, fake_trainers
from tests.scorers import Told

EXPERIMENT = "people"
Person = Callable[[str, str], object]
"""What somebody says of answers A and B."""


def prompts(*names: str) -> tuple[Prompt, ...]:
    return tuple(
        Prompt(name, ({"role": "user", "content": f"Write {name}. ![{name}](http://x.invalid/y)"},), (1, 2, 3))
        for name in names
    )


PROMPTS = PromptSet(prompts("a", "b"), prompts("x", "y"), "embedded:review-topics", "0" * 64)


def config(folder: Path, uri: str, name: str = "asks", *settings: str) -> OnlineDpoConfig:
    """One round, two prompts with three candidates: six questions. `settings` are KEY=VALUE."""
    tree = {
        "scoring": {"type": "human"},
        "sampling": {"num_generations": 3},
        "schedule": {"rounds": 1, "prompts_per_round": 2},
        "trainer": {"per_device_train_batch_size": 1},
        "tracking": {"uri": uri, "experiment": EXPERIMENT},
        "run": {"seed": 7, "name": name, "dir": str(folder / "runs")},
    }
    return parse_config(tree, settings)


def built(block: ScoringBlock) -> ItemScorer:
    """Compositions as they are; in the place of every other scorer the number of "good" in a completion."""
    if isinstance(block, CompositionBlock):
        return composed(block, {name: built(member) for name, member in block.members.items()})
    return Told(lambda text: Score(float(text.count("good"))))


class ComposedScorer(FakeScorer):
    """The scorer of a composition, without its actor."""

    def __init__(self, events: list[str], block: ScoringBlock) -> None:
        super().__init__(events, block)
        self._scorer = built(block)

    def score(
        self,
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
        advance: Callable[[int], None] = lambda items: None,
    ) -> list[Score]:
        by_id = {prompt.id: prompt for prompt in prompts}
        return self._scorer.score([ScoringItem(by_id[own.prompt_id], own.text) for own in candidates])


class Engine(FakeEngine):
    """No two answers of it are the same, whatever it was asked before."""

    def _candidate(self, prompt: Prompt, index: int, of: int, version: int, seed: int) -> Candidate:
        found = super()._candidate(prompt, index, of, version, seed)
        ids, logprobs = (5, *found.token_ids), found.logprobs[:1] + found.logprobs
        return replace(found, text=f"{seed} {found.text}", token_ids=ids, logprobs=logprobs)


def play(config: OnlineDpoConfig, folder: Path) -> list[str]:
    """What `recipes.online_dpo.main` does, with fakes in the place of actors; the events of the team."""
    events: list[str] = []
    require_answers(config)
    directory = continue_or_create(config)
    with directory.locked(), recorded(tracker := open_tracker(directory.path, config.tracking), directory):
        run = Run(config, directory, tracker, Console(file=io.StringIO()))
        run.open_record(PROMPTS, "train")
        generators, group = FakeGenerators([Engine(events)]), fake_trainers(FakeRank(events, config), config)
        transport = ShmTransport(OneNode(folder), {WEIGHT: (1,)}, 1)
        publisher = WeightPublisher(group, generators, transport, Canary(((1, 2, 3),), 0.25), 1.0)
        train(run, PROMPTS, FakeTeam(generators, group, ComposedScorer(events, config.scoring), publisher), config)
    return events


class Reviewer:
    """Somebody who answers the questions of a queue."""

    def __init__(self, uri: str, queue: str, name: str = "ann", experiment: str = EXPERIMENT) -> None:
        self.store, self._client = TracingClient(uri).store, TracingClient(uri)
        found = MlflowClient(uri).get_experiment_by_name(experiment)
        assert found is not None
        self.experiment, self._name = found.experiment_id, name
        self.queue = self.store.get_review_queue_by_name(self.experiment, name=queue)

    def items(self) -> list[str]:
        """Trace ids, as the queue has them."""
        return [item.item_id for item in self.store.list_review_queue_items(self.queue.queue_id, max_results=100)]

    def answer(self, trace_ids: Sequence[str], says: Person, why: str = "") -> None:
        for trace_id in trace_ids:
            outputs = self._client.get_trace(trace_id).data.spans[0].outputs
            choice = says(outputs["Answer A"], outputs["Answer B"])
            self._give(trace_id, WHICH, choice)
            if why:
                self._give(trace_id, WHY, why)
            self.store.set_review_queue_item_status(
                self.queue.queue_id, item_id=trace_id, status=ReviewStatus.COMPLETE, completed_by=self._name
            )

    def decline(self, trace_id: str) -> None:
        self.store.set_review_queue_item_status(
            self.queue.queue_id, item_id=trace_id, status=ReviewStatus.DECLINED, completed_by=self._name
        )

    def _give(self, trace_id: str, name: str, value: object) -> None:
        source = AssessmentSource(source_type=AssessmentSourceType.HUMAN, source_id=self._name)
        self._client.log_assessment(trace_id, Feedback(name=name, value=value, source=source))  # type: ignore[arg-type]


def fewer_good(answer_a: str, answer_b: str) -> object:
    """A person who likes what the fakes' own scorer does not."""
    first, second = answer_a.count("good"), answer_b.count("good")
    return "tie" if first == second else "A" if first < second else "B"
