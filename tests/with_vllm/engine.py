"""One vLLM engine and a list of steps: `engine.py steps.json answer.json`."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from processes import TOKENS
from vllm import LLM, SamplingParams


def run(llm: LLM, step: dict[str, Any]) -> Any:
    ((kind, value),) = step.items()
    if kind == "generate":
        return [_generate(llm, prompt) for prompt in value]
    if kind == "checksums":
        found: dict[str, str] = {}
        for rank in llm.collective_rpc("compute_weight_checksums"):
            found |= rank
        return found
    if kind == "full":  # vLLM's own reload of a whole checkpoint
        llm.collective_rpc("reload_weights", kwargs={"weights_path": value})
        llm.reset_prefix_cache()
        return "done"
    assert kind == "update"
    try:
        llm.init_weight_transfer_engine({"init_info": {}})
        llm.start_weight_update()
        llm.update_weights({"update_info": value})
        llm.finish_weight_update()
    except Exception as error:
        with contextlib.suppress(Exception):  # it ends the update, and says that there is none
            llm.finish_weight_update()
        return f"{type(error).__name__}: {error}"
    finally:
        llm.reset_prefix_cache()
    return "done"


def _generate(llm: LLM, prompt: str) -> dict[str, Any]:
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=2, ignore_eos=True)
    (result,) = llm.generate([prompt], sampling, use_tqdm=False)
    (output,) = result.outputs
    ranked = [
        sorted((one.logprob for one in each.values()), reverse=True) for each in output.logprobs
    ]
    return {
        "tokens": list(output.token_ids),
        "logprobs": [
            each[token].logprob
            for token, each in zip(output.token_ids, output.logprobs, strict=True)
        ],
        "margin": min(first - second for first, second in ranked),
    }


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[1]).read_text())
    engine = LLM(**request["engine"])
    answers = [run(engine, step) for step in request["steps"]]
    Path(sys.argv[2]).write_text(json.dumps(answers))
