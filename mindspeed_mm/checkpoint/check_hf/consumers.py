"""Programs that load Hugging Face directories, and what a check of one finds for each of them.

transformers, vLLM and SGLang read the directory themselves. lmms-eval and VLMEvalKit load it with whichever
transformers is installed. EvalScope asks a server, since it loads no model of images itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable

from mindspeed_mm.errors import UserError

TRANSFORMERS4, TRANSFORMERS5, VLLM, SGLANG = "transformers-4.57", "transformers-5", "vllm", "sglang"
LMMS_EVAL, VLMEVALKIT, EVALSCOPE = "lmms-eval", "vlmevalkit", "evalscope"
TRANSFORMERS = frozenset({TRANSFORMERS4, TRANSFORMERS5})
SERVERS = frozenset({VLLM, SGLANG})
LOADERS = TRANSFORMERS | SERVERS
"""Those that read the files themselves."""
TITLES = {
    TRANSFORMERS4: "transformers 4.57", TRANSFORMERS5: "transformers 5", VLLM: "vLLM", SGLANG: "SGLang",
    LMMS_EVAL: "lmms-eval", VLMEVALKIT: "VLMEvalKit", EVALSCOPE: "EvalScope",
}
READ = {
    TRANSFORMERS4: "4.57.6", TRANSFORMERS5: "5.19, 5.24", VLLM: "0.33.0", SGLANG: "0.5.23", LMMS_EVAL: "75571cf",
    VLMEVALKIT: "e8e78f0", EVALSCOPE: "fde259d",
}
"""Version or commit by which the requirements were established."""
_THROUGH = {LMMS_EVAL: TRANSFORMERS, VLMEVALKIT: TRANSFORMERS, EVALSCOPE: SERVERS}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is missing or worth knowing.

    Attributes:
        topic: file or part of the directory, in a few words.
        problem: what is the case.
        remedy: what to do.
        blocks: consumers that cannot use the directory as it is.
        notes: consumers that can, but whose user should know.
    """

    topic: str
    problem: str
    remedy: str
    blocks: frozenset[str]
    notes: frozenset[str]


class Findings(list[Finding]):
    """What a check has found so far."""

    def add(
        self, topic: str, problem: str, remedy: str, *, blocks: Collection[str] = (), notes: Collection[str] = ()
    ) -> None:
        """Add a finding for consumers, and for those that load through them.

        A consumer that can load through several others is blocked if all of them are, and gets a note if some are.
        """
        blocked, noted = set(blocks), set(notes)
        for consumer, loaders in _THROUGH.items():
            if loaders <= blocked:
                blocked.add(consumer)
            elif loaders & (blocked | noted):
                noted.add(consumer)
        self.append(Finding(topic, problem, remedy, frozenset(blocked), frozenset(noted - blocked)))


def titles(consumers: Iterable[str]) -> str:
    """``vLLM, SGLang``, in the order of :data:`TITLES`."""
    chosen = set(consumers)
    return "all" if chosen == TITLES.keys() else ", ".join(TITLES[name] for name in TITLES if name in chosen)


def chosen(names: Collection[str]) -> tuple[str, ...]:
    """The consumers that ``--for`` names; all for none. ``transformers`` stands for both generations.

    Raises:
        UserError: for an unknown name.
    """
    wanted: set[str] = set()
    for name in names:
        key = name.lower().replace("_", "-")
        if key == "transformers":
            wanted |= TRANSFORMERS
        elif key in TITLES:
            wanted.add(key)
        else:
            raise UserError(f"--for {name}: unknown; choose of transformers, {', '.join(TITLES)}")
    return tuple(name for name in TITLES if name in wanted or not names)
