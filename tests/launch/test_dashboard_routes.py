"""Every route of a running Ray's dashboard, asked by a client without the token."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from tests.launch.two_nodes import TwoNodes, two_nodes

pytestmark = [pytest.mark.slow, pytest.mark.all_cores]

# Ray 2.60 leaves these open: the page itself, its files, how to log in, and whether it lives.
PUBLIC = re.compile(
    r"/|/favicon\.ico|/static/.*|/api/authentication_mode|/api/authenticate|/api/healthz"
    r"|/api/gcs_healthz|/api/local_raylet_healthz|/-/healthz"
)


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    with two_nodes() as found:
        yield found


def routes() -> list[tuple[str, str]]:
    """Method and path of all routes, from the tables that Ray's dashboard serves them by."""
    from ray.dashboard.head import DashboardHeadModule
    from ray.dashboard.optional_utils import DashboardHeadRouteTable
    from ray.dashboard.subprocesses.module import SubprocessModule
    from ray.dashboard.subprocesses.routes import SubprocessRouteTable
    from ray.dashboard.utils import get_all_modules

    for kind in (DashboardHeadModule, SubprocessModule):
        get_all_modules(kind)  # the import fills the tables
    found = {
        (method, path)
        for table in (DashboardHeadRouteTable, SubprocessRouteTable)
        for method, paths in table._bind_map.items()
        for path in paths
    }
    return sorted(found)


def asked(nodes: TwoNodes, method: str, path: str, token: str | None) -> int:
    """The status of the answer."""
    url = f"http://127.0.0.1:{nodes.dashboard}" + re.sub(r"\{[^}]*\}", "x", path)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_no_route_but_the_public_ones_answers_without_the_token(nodes: TwoNodes) -> None:
    found = [(m, p) for m, p in routes() if not PUBLIC.fullmatch(p)]
    assert ("POST", "/api/jobs/") in found and len(found) >= 40, found
    methods = {m: "GET" if m == "*" else m for m, _ in found}
    for token in (None, "0" * 32):
        told = {(m, p): asked(nodes, methods[m], p, token) for m, p in found}
        open_ = {route: code for route, code in told.items() if code not in (401, 403)}
        assert not open_, f"answered with the token {token}: {open_}"


def test_with_the_token_they_answer(nodes: TwoNodes) -> None:
    """Else the test above would pass on a dashboard that refuses everyone."""
    token = nodes.environment["RAY_AUTH_TOKEN"]
    assert asked(nodes, "GET", "/api/jobs/", token) == 200


def test_what_it_listens_on_is_this_machine_alone(nodes: TwoNodes) -> None:
    import psutil

    listening = {
        c.laddr.ip
        for c in psutil.net_connections("tcp")
        if c.status == psutil.CONN_LISTEN and c.laddr.port == nodes.dashboard
    }
    assert listening == {"127.0.0.1"}
