"""Requests made from the OpenAPI schema, valid and not: the server answers as it promises.

``make serve-fuzz`` sends a thousand and more.
"""

from __future__ import annotations

import os

import pytest
import schemathesis
import servers
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

REQUESTS = int(os.environ.get("NPS_COMPRESS_SERVE_REQUESTS", "64"))
PROMPT = "the red cat runs"
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]


@pytest.fixture(scope="module")
def server(causal_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("allowed")
    options = {"folders": [folder], "max_tokens": 48, "max_body": 0.05}
    with servers.running(causal_world.settings(**options)) as found:
        yield found


def test_hostile_requests_are_answered_as_the_schema_says(causal_world, server):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    config = schema.config.generation
    config.modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
    operations = [each.ok() for each in schema.get_all_operations()]
    assert len(operations) >= 9
    each = max(REQUESTS // len(operations), 1)
    seen: dict[int, int] = {}
    for operation in operations:
        for mode in config.modes:
            if mode is GenerationMode.NEGATIVE and operation.method == "get":
                continue  # of a path, any text is right

            @settings(
                max_examples=max(each // 2, 1),
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @_given(operation.as_strategy(generation_mode=mode))
            def send(case):
                checks = CHECKS
                is_named = _name_a_task(case)
                answer = case.call(timeout=60)
                # What was wrong may have been the name; and 413 is a refusal, too.
                if is_named or answer.status_code == 413:
                    checks = [check for check in CHECKS if check is not negative_data_rejection]
                seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
                case.validate_response(answer, checks=checks)

            send()
    assert {200, 400, 404} <= set(seen), seen
    assert max(seen) < 500
    servers.wait_until(server.is_idle)
    for name in ("base", *causal_world.tasks):
        assert server.text(name, PROMPT) == causal_world.greedy(name, PROMPT, 8)[0]


def _given(strategy):
    from hypothesis import given

    return given(strategy)


def _name_a_task(case) -> bool:
    """Names made up from nothing are all unknown: let most requests have one that is known."""
    if not isinstance(case.body, dict) or not isinstance(case.body.get("model"), str):
        return False
    number = len(case.body["model"]) % 4
    if number < 3:
        case.body["model"] = ("law", "base", "med")[number]
    return number < 3
