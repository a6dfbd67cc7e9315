#!/usr/bin/env python3
"""A client that only knows QEMU drives a migration: the package `qemu.qmp`, unmodified.

usage: qmp_client.py SOURCE.sock DESTINATION.sock URI

Both VMs run already; the destination was started with `--migrate-listen defer`. URI may have port 0:
the port is then asked for, as management software does. Prints one JSON object with what was seen;
exits with 1 and the reason if anything was not as a client of QEMU's expects it.
"""

import asyncio
import json
import sys

from qemu.qmp import EventListener, ExecuteError, QMPClient

# How long anything may take, in seconds.
PATIENCE = 120
# Words of the status that are not the end; libvirt and Proxmox treat unknown ones as errors.
UNDERWAY = {"setup", "active", "device", "pre-switchover", "cancelling", "wait-unplug"}
RAM_FIELDS = {
    "transferred", "remaining", "total", "duplicate", "skipped", "normal", "normal-bytes",
    "dirty-pages-rate", "mbps", "dirty-sync-count", "postcopy-requests", "page-size",
    "multifd-bytes", "pages-per-second", "precopy-bytes", "downtime-bytes", "postcopy-bytes",
    "dirty-sync-missed-zero-copy",
}


def check(condition, what):
    if not condition:
        raise AssertionError(what)


class Side:
    """One VM: its client, and the events that it has told."""

    def __init__(self, name, socket):
        self.socket = socket
        self.client = QMPClient(name)
        self.events = []
        self.listener = EventListener()

    async def __aenter__(self):
        self.client.register_listener(self.listener)
        await self.client.connect(self.socket)
        return self

    async def __aexit__(self, *_):
        try:
            await self.client.disconnect()
        except Exception:  # pylint: disable=broad-except
            # A VM that has ended has hung up already; the package calls that an error.
            pass

    async def run(self, command, **arguments):
        arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
        return await self.client.execute(command, arguments or None)

    async def refused(self, command, words, **arguments):
        try:
            await self.run(command, **arguments)
        except ExecuteError as error:
            check(error.error_class == "GenericError", f"{command}: class {error.error_class}")
            check(words in str(error), f"{command} was refused with other words: {error}")
            return
        raise AssertionError(f"{command} was not refused")

    async def wait_event(self, name, status=None):
        while True:
            event = await asyncio.wait_for(self.listener.get(), PATIENCE)
            word = event.get("data", {}).get("status")
            self.events.append(f"{event['event']} {word}" if word else event["event"])
            check(event["timestamp"]["seconds"] > 0, "an event without a time")
            if event["event"] == name and word == status:
                return event


async def drive(source, destination, uri):
    version = await source.run("query-version")
    check(version["qemu"]["major"] >= 7, f"version {version}")
    commands = {c["name"] for c in await source.run("query-commands")}
    for needed in ("migrate", "migrate_cancel", "query-migrate", "query-cpus-fast", "quit"):
        check(needed in commands, f"{needed} is not listed")
    check((await source.run("query-status"))["running"], "the source does not run")
    check((await destination.run("query-status"))["status"] == "inmigrate", "the destination does not wait")
    check(await source.run("query-migrate") == {}, "a migration before the first")
    await source.refused("migrate", "Parameter 'nonsense' is unexpected", uri=uri, nonsense=1)

    on = [{"capability": "events", "state": True}, {"capability": "return-path", "state": True}]
    for side in (source, destination):
        await side.run("migrate-set-capabilities", capabilities=on)
    await source.run("migrate-set-parameters", downtime_limit=300, max_bandwidth=0)
    check((await source.run("query-migrate-parameters"))["downtime-limit"] == 300, "downtime-limit")

    await destination.run("migrate-incoming", uri=uri)
    if uri.endswith(":0"):
        address = (await destination.run("query-migrate"))["socket-address"][0]
        check(isinstance(address["port"], str), "the port is not a string")
        uri = f"tcp:{address['host']}:{address['port']}"

    await source.run("migrate", uri=uri, detach=True, resume=False)
    seen = []
    while True:
        info = await source.run("query-migrate")
        if info["status"] not in seen:
            seen.append(info["status"])
        if "ram" in info:
            check(RAM_FIELDS <= set(info["ram"]), f"missing: {RAM_FIELDS - set(info['ram'])}")
        if info["status"] not in UNDERWAY:
            break
        await asyncio.sleep(0.02)
    check(info["status"] == "completed", f"the migration ended so: {info}")
    check(info["total-time"] >= info["downtime"] > 0, f"times: {info}")
    await source.wait_event("MIGRATION", "completed")
    await destination.wait_event("MIGRATION", "completed")
    check((await source.run("query-status"))["status"] == "postmigrate", "the source's state")
    check((await destination.run("query-status"))["status"] == "running", "the destination's state")
    await source.refused("cont", "has been given away")
    await source.run("quit")
    shutdown = await source.wait_event("SHUTDOWN")
    check(shutdown["data"] == {"guest": False, "reason": "host-qmp-quit"}, f"{shutdown}")

    await destination.run("stop")
    await destination.wait_event("STOP")
    await destination.run("cont")
    await destination.wait_event("RESUME")
    return {"status": seen, "downtime": info["downtime"]}


async def main():
    source_socket, destination_socket, uri = sys.argv[1:]
    async with Side("source", source_socket) as source, Side("destination", destination_socket) as destination:
        try:
            result = await asyncio.wait_for(drive(source, destination, uri), 2 * PATIENCE)
        except (AssertionError, ExecuteError, asyncio.TimeoutError) as error:
            sys.exit(f"{type(error).__name__}: {error}\nsource: {source.events}\ndestination: {destination.events}")
        result |= {"source": source.events, "destination": destination.events}
        print(json.dumps(result))


asyncio.run(main())
