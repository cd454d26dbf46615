"""The weight transfer engine `nps`: a running engine becomes one task after another."""

from __future__ import annotations

import json

import pytest
from processes import HERE, TWO, environment, free_port, offline, serving

from nps_compress.vllm import arguments

ENGINE = {"weight_transfer_config": {"backend": "nps"}}


def update(task):
    return {"update": {"task": None if task is None else str(task)}}


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_weight_is_the_full_checkpoints(ranks, models, tmp_path):
    """By checksums of all parameters, beside vLLM's own reload of the full checkpoints."""
    steps = [{"checksums": 0}]
    for name in ("law", "med", "base"):
        task = None if name == "base" else models / f"{name}.nps"
        steps += [update(task), {"checksums": 0}]
    for bad in ("damaged.nps", "none.nps"):
        steps += [update(models / "code.nps"), update(models / bad), {"checksums": 0}]
    if ranks == 2:  # one rank alone must not switch
        infos = [{"task": str(models / "law.nps")}, {"task": str(models / "damaged.nps")}]
        steps += [{"update": infos}, {"checksums": 0}]
        steps += [{"update": infos[::-1]}, {"checksums": 0}]
        steps += [{"update": [infos[0], {"task": None}]}, {"checksums": 0}]
    for name in ("law", "med", "code"):
        steps += [{"full": str(models / name)}, {"checksums": 0}]
    out = iter(
        offline(
            steps,
            tmp_path,
            environment(PYTHONPATH=str(HERE), **(TWO if ranks == 2 else {})),
            model=str(models / "base"),
            tensor_parallel_size=ranks,
            worker_extension_cls="unpacked.Unpacked",
            **ENGINE,
        )
    )
    base = next(out)
    assert len(base) == ranks * 21  # 3 layers of 6, embedding, norm and head: none is left out
    seen = {}
    for name in ("law", "med", "base"):
        assert next(out) == "done"
        seen[name] = next(out)
    assert seen["base"] == base
    faults = {"damaged.nps": "P-DIGEST", "none.nps": "a readable file"}
    for bad in ("damaged.nps", "none.nps"):
        assert next(out) == "done"
        assert faults[bad] in next(out)
        seen[bad] = next(out)
    for fault in ("P-DIGEST", "P-DIGEST", "different tasks") if ranks == 2 else ():
        assert fault in next(out)
        assert next(out) == seen["none.nps"]
    for name in ("law", "med", "code"):
        next(out)
        seen[f"full {name}"] = next(out)
    assert seen["law"] == seen["full law"]
    assert seen["med"] == seen["full med"]
    assert seen["damaged.nps"] == seen["none.nps"] == seen["full code"]
    assert len({json.dumps(seen[name]) for name in ("law", "med", "base", "full code")}) == 4


@pytest.mark.parametrize("ranks", [1, 2])
def test_through_vllms_routes(ranks, models, answers, tmp_path):
    options = arguments.switched(models / "base", name="any", port=free_port())
    options += ["--tensor-parallel-size", str(ranks)]
    variables = {arguments.SWITCH_VARIABLE: "1", **(TWO if ranks == 2 else {})}
    prompts = list(answers["base"])[:8]
    with serving(tmp_path, options, **variables) as server:

        def post(route, body=None):
            status, answer = server.call(route, {} if body is None else body)
            assert status == 200, answer
            return answer

        def switch(name):
            post("/pause?mode=wait")
            post("/start_weight_update")
            task = None if name == "base" else str(models / f"{name}.nps")
            status, answer = server.call("/update_weights", {"update_info": {"task": task}})
            finished, _ = server.call("/finish_weight_update", {"weight_version": name})
            assert finished == status
            post("/resume")
            return status, answer

        def check(name):
            given = [server.complete("any", prompt) for prompt in prompts]
            if ranks == 1:  # two ranks add in another order
                assert given == [
                    (answers[name][p].tokens, answers[name][p].logprobs) for p in prompts
                ]
            for (tokens, logprobs), prompt in zip(given, prompts, strict=True):
                expected = answers[name][prompt]
                assert logprobs[0] == pytest.approx(expected.logprobs[0], abs=0.1)
                assert tokens[0] == expected.tokens[0] or expected.margin < 0.1
            return given

        post("/init_weight_transfer_engine", {"init_info": {}})
        checksums = post("/weight_checker", {"action": "checksum"})["checksums"]
        before = check("base")
        for name in ("law", "med", "code"):
            assert switch(name)[0] == 200
            assert server.call("/weight_info")[1] == {"weight_version": name}
            given = check(name)
            assert not post("/weight_checker", {"action": "compare", "baseline": checksums})[
                "match"
            ]
        status, _ = switch("damaged")
        assert status == 500
        assert check("code") == given  # the former one stays
        assert switch("base")[0] == 200
        assert post("/weight_checker", {"action": "compare", "baseline": checksums})["match"]
        assert check("base") == before


def test_refuses_a_compiled_model_on_a_cpu(models, tmp_path):
    with pytest.raises(AssertionError, match="--enforce-eager"):
        offline(
            [], tmp_path, environment(), model=str(models / "base"), enforce_eager=False, **ENGINE
        )
