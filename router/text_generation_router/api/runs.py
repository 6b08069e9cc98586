"""Several runs of one prompt: the answers of `n`, or the best ones of `best_of`."""

from collections.abc import Sequence
from dataclasses import dataclass

from text_generation_router.api.generation import Generation, GenerationRequest, together
from text_generation_router.generation_options import GenerationOptions
from text_generation_router.sampling import request_of_run
from text_generation_router.token_stream import TokenOutput
from text_generation_router.valid_request import ValidRequest


@dataclass(frozen=True)
class Run:
    """A run that has ended, with all its tokens."""

    generation: Generation
    outputs: list[TokenOutput]

    @property
    def text(self) -> str:
        """The whole generated text."""
        return "".join(output.text for output in self.outputs)

    @property
    def mean_logprob(self) -> float:
        """How likely its tokens were."""
        return sum(output.logprob for output in self.outputs) / max(len(self.outputs), 1)


def submit_runs(record: GenerationRequest, request: ValidRequest, options: GenerationOptions) -> list[Generation]:
    """Queue all runs of a request; those after the first find the prompt's full blocks in the prefix cache."""
    first = record.submit(request, options)
    others = range(1, options.num_runs)
    return [first, *(record.submit(request_of_run(request, number), options, first) for number in others)]


async def read_runs(generations: Sequence[Generation]) -> list[Run]:
    """All of them to their ends; the first error ends the rest and is raised."""
    runs: dict[int, Run] = {}

    async def read(index: int) -> None:
        generation = generations[index]
        runs[index] = Run(generation, await generation.read_all())

    await together([read(index) for index in range(len(generations))])
    return [runs[index] for index in range(len(generations))]


def best_runs(runs: Sequence[Run]) -> Sequence[Run]:
    """The runs of one prompt: the best first, if there are more than answers are wanted; else as they were numbered."""
    options = runs[0].generation.options
    return sorted(runs, key=lambda run: -run.mean_logprob) if options.num_runs > options.num_answers else runs
