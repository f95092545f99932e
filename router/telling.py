"""Alerts on their way: to the log, and to a webhook if there is one. Nothing waits for either."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import httpx

from common import logs
from common.config import RouterSettings
from router.alerts import Alert, Status

_log = logs.get_logger("alerts")

# A receiver that is away is not told of hours later.
_MOST_WAITING = 100
_AFTER_A_BUG_S = 60.0
_ATTEMPTS = 3
_BACKOFF_S = 1.0


class Telling:
    """Sends alerts. `run` does the sending."""

    def __init__(self, settings: RouterSettings) -> None:
        self._url = settings.alert_webhook_url
        self._timeout_s = settings.alert_timeout_s
        self._router = f"{settings.host}:{settings.port}"
        self._waiting: asyncio.Queue[dict[str, Any]] = asyncio.Queue(_MOST_WAITING)

    def tell(self, alert: Alert) -> None:
        """Logs it, and has it sent. With too many waiting, it is only logged."""
        body = _body(alert, self._router)
        log = _log.info if alert.status is Status.RESOLVED else _log.error
        log("alert", **{name: value for name, value in body.items() if name not in ("router", "time")})
        if self._url is None:
            return
        try:
            self._waiting.put_nowait(body)
        except asyncio.QueueFull:
            _log.warning("too many alerts wait for the webhook; one is only here")

    async def run(self) -> None:
        """Sends what waits, one after the other, until cancelled."""
        if self._url is None:
            await asyncio.Event().wait()
        while True:
            try:
                async with httpx.AsyncClient(timeout=self._timeout_s) as client:
                    while True:
                        await self._send(client, await self._waiting.get())
            except Exception as bug:
                # Such as a proxy in the environment that httpx cannot use. Who cannot tell serves all the same.
                _log.error("telling failed by a bug", **logs.describe_bug(bug))
                await asyncio.sleep(_AFTER_A_BUG_S)

    async def _send(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        assert self._url is not None
        for attempt in range(_ATTEMPTS):
            if attempt:
                await asyncio.sleep(_BACKOFF_S * 2 ** (attempt - 1))
            try:
                # httpx bounds each step of its own; this bounds them together, such as an answer that only drips.
                async with asyncio.timeout(self._timeout_s):
                    answer = await client.post(self._url.get_secret_value(), json=body)
            except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, OSError) as error:
                why = type(error).__name__
            else:
                if answer.is_success:
                    return
                why = str(answer.status_code)
        _log.warning("the webhook does not take an alert", why=why, alert=body["alert"])


def _body(alert: Alert, router: str) -> dict[str, Any]:
    finding = alert.finding
    return {
        "status": alert.status.value,
        "alert": finding.name,
        "subject": finding.subject,
        "condition": finding.condition.name.lower(),
        "figure": finding.figure,
        "unit": finding.unit,
        "why": finding.message,
        "router": router,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
