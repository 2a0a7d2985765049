"""``python -m tests.hostile.openapi``: requests that schemathesis makes from the OpenAPI document.

They go to a real agent, with real etcd and a real kernel, on a lab host of its own.  The agent has
a PID namespace, too: a process number that schemathesis makes up must not be somebody else's.

What holds: no answer is of status 500 or above, every answer is as the document says, a refused
request leaves networks, endpoints, containers and images as they were, and the agent lives.
"""

from __future__ import annotations

import argparse
import http.client
import secrets
import socket
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import hypothesis
import requests
import schemathesis
from hypothesis import strategies as st
from requests.adapters import BaseAdapter
from schemathesis.generation import GenerationMode
from urllib3 import HTTPResponse

from meshnet.lab.agent import is_ready
from meshnet.lab.poll import wait_until
from meshnet.lab.topology import Lab

if TYPE_CHECKING:
    from collections.abc import Mapping

    from meshnet.lab.host import LabHost

_URL = "http://agent"
_TIMEOUT_S = 30.0
_EXAMPLES = 25
"""Requests for one operation and one kind of value, in a row."""
_STATE = ("networks", "endpoints", "containers", "images")
"""What a refused request must leave as it was."""


class _UnixAdapter(BaseAdapter):  # type: ignore[misc]  # untyped without the fuzz extra
    """Carries what `requests` sends over a Unix stream socket."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: object = None,
        verify: object = True,
        cert: object = None,
        proxies: Mapping[str, str] | None = None,
    ) -> requests.Response:
        """One request, one connection."""
        connection = http.client.HTTPConnection("agent", timeout=_TIMEOUT_S)
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.sock.settimeout(_TIMEOUT_S)
        connection.sock.connect(str(self._path))
        url = urlsplit(request.url or "")
        target = str(url.path) + (f"?{url.query!s}" if url.query else "")
        connection.request(request.method or "GET", target, request.body, dict(request.headers))
        answer = connection.getresponse()
        response = requests.Response()
        response.status_code = answer.status
        response.headers.update(answer.headers.items())
        response._content = answer.read()
        response.raw = HTTPResponse(body=b"", headers=answer.headers.items(), status=answer.status)
        response.request = request
        response.url = request.url or ""
        response.encoding = "utf-8"
        connection.close()
        return response

    def close(self) -> None:
        """Nothing is kept open."""


def _start_agent(lab: Lab, host: LabHost) -> int:
    """Start it, and beside it a process to attach; returns that one's number to the agent."""
    agent = [
        *(sys.executable, "-m", "meshnet_agent", "--etcd", lab.etcd_url),
        *("--underlay-ip", str(host.underlay_ip), "--host-id", host.name),
        *("--run-dir", str(host.run_dir), "--state-dir", str(host.state_dir)),
        *("--log-level", "error"),
    ]
    with host.log_path.open("a") as log:
        unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        parent = host.popen([*unshare, *agent], stdout=log)
    wait_until(lambda: is_ready(host.socket_path), _TIMEOUT_S, f"ready; see {host.log_path}")
    inside = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().strip()
    # nsenter stays in its own PID namespace; its child is in the agent's.
    enter = ["nsenter", f"--pid=/proc/{inside}/ns/pid", "--", "unshare", "--net", "sleep", "9999"]
    outer = host.popen(enter)
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    wait_until(lambda: children.read_text().strip(), _TIMEOUT_S, "a process to attach")
    status = Path(f"/proc/{children.read_text().strip()}/status").read_text()
    return int(status.partition("NSpid:")[2].splitlines()[0].split()[-1])


class _Campaign:
    """Requests to one agent.

    Attributes:
        became: how many requests got which status.
        found: what is wrong.
    """

    def __init__(self, path: Path, pid: int) -> None:
        self.became: Counter[int] = Counter()
        self.found: list[str] = []
        self._known = {"network": "prod", "pid": pid, "name": "prod", "endpoint": "web"}
        self._session = requests.Session()
        self._session.mount(_URL, _UnixAdapter(path))
        self._schema = schemathesis.openapi.from_dict(self._get("/openapi.json"))
        self._post("/v1/networks", {"name": "prod", "subnets": ["10.42.0.0/16"]})
        self._post("/v1/attach", {"network": "prod", "pid": pid, "name": "web"})
        self._before = self._state()

    def _get(self, path: str) -> Any:  # noqa: ANN401
        return self._session.get(_URL + path).json()

    def _post(self, path: str, body: Any) -> None:  # noqa: ANN401
        self._session.post(_URL + path, json=body).raise_for_status()

    def _state(self) -> list[Any]:
        return [self._get(f"/v1/{name}") for name in _STATE]

    def run(self, seed: int, deadline: float) -> None:
        """Every operation with values as documented, then with others; until the time is over."""
        operations = [result.ok() for result in self._schema.get_all_operations()]
        for number in range(1_000_000):
            for operation in operations:
                for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                    if time.monotonic() > deadline:
                        return
                    self._try(operation, mode, seed + number)

    def _try(self, operation: Any, mode: GenerationMode, seed: int) -> None:  # noqa: ANN401
        try:
            strategy = operation.as_strategy(generation_mode=mode)
        except hypothesis.errors.InvalidArgument:
            return

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=_EXAMPLES,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=strategy, known=st.sets(st.sampled_from(sorted(self._known))))
        def check(case: Any, known: set[str]) -> None:  # noqa: ANN401
            for place in (case.path_parameters, case.body):
                if isinstance(place, dict):
                    place.update({key: self._known[key] for key in known & place.keys()})
            response = case.call(base_url=_URL, session=self._session)
            self.became[response.status_code] += 1
            case.validate_response(response, excluded_checks=_excluded())
            before, self._before = self._before, self._state()
            if response.status_code >= 400:
                assert self._before == before, f"{response.status_code}, yet something changed"

        try:
            check()
        except hypothesis.errors.Unsatisfiable:
            return  # such as wrong values for an operation that takes none
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            self.found.append(f"{operation.label}, {mode.value}: " + "\n      ".join(lines[:20]))


def _excluded() -> list[Any]:
    """Checks that ask for more than the API promises.

    A value that the schema allows may still be refused (a process that is not there), and of those
    that it does not allow some are understood: that is for campaign ``api``.
    """
    from schemathesis.specs.openapi import checks

    return [
        checks.positive_data_acceptance,
        checks.negative_data_rejection,
        checks.missing_required_header,
        checks.unsupported_method,
    ]


def main() -> int:
    """Run; the exit status is 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile.openapi", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.minutes:g} minutes")
    with Lab(f"fuzz{options.seed % 100_000}", hosts=1, start_agents=False) as lab:
        host = lab.hosts[0]
        campaign = _Campaign(host.socket_path, _start_agent(lab, host))
        campaign.run(options.seed, time.monotonic() + options.minutes * 60)
        if not is_ready(host.socket_path):
            campaign.found.append(f"the agent is not ready any more; see {host.log_path}")
        log = host.log_path.read_text()
        if "Traceback" in log:
            campaign.found.append(f"the agent's log has a traceback:\n{log[-3000:]}")
    words = ", ".join(f"{count} {status}" for status, count in sorted(campaign.became.items()))
    print(f"openapi {campaign.became.total():13} requests: {words}; {len(campaign.found)} findings")
    for what in campaign.found:
        print(f"    {what}")
    return 1 if campaign.found else 0


if __name__ == "__main__":
    sys.exit(main())
