"""A proxy on loopback that does to a connection what networks do: delay, throttle, cut, go silent,
flip a bit. It passes TCP through, so TLS stays whole between the two ends.
"""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Self

_BLOCK_BYTES = 16 * 1024
_RESET = struct.pack("ii", 1, 0)


class ChaosProxy:
    """Listens on a free port and relays to `target`. Faults may be set while it runs."""

    def __init__(self, target: str) -> None:
        """Args: target: host:port."""
        self.latency_s = 0.0
        """Added to each block, each way."""
        self.bytes_per_s = 0.0
        """Of each direction of each connection; 0: no limit."""
        self.cuts: Iterator[int] = iter(())
        """Each next number: so many bytes later on the way up, every connection is reset."""
        self.flips: Iterator[int] = iter(())
        """Each next number: so many bytes later on the way up, one bit is wrong."""
        self.up_bytes = 0
        self.connections = 0
        self.resets = 0
        self.flipped = 0
        self._target = target
        self._open = asyncio.Event()
        self._to_cut: int | None = None
        self._to_flip: int | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._relay, "127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self.heal()
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def blackhole(self) -> None:
        """Keep every connection open and pass nothing on."""
        self._loop.call_soon_threadsafe(self._open.clear)

    def heal(self) -> None:
        """Pass on again what came meanwhile."""
        self._loop.call_soon_threadsafe(self._open.set)

    def reset(self) -> None:
        """Reset every connection (RST)."""
        self._call(self._reset())

    def _call(self, work: object) -> object:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()  # type: ignore[arg-type]

    async def _end(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _reset(self) -> None:
        self.resets += 1
        for writer in list(self._writers):
            sock = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        host, _, port = self._target.rpartition(":")
        try:
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, far_writer}
        self._writers |= ends
        try:
            await asyncio.gather(
                self._pump(reader, far_writer, up=True), self._pump(far_reader, writer, up=False)
            )
        finally:
            self._writers -= ends
            for end in ends:
                end.close()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_BLOCK_BYTES):
                await asyncio.sleep(
                    self.latency_s + (len(data) / self.bytes_per_s if self.bytes_per_s else 0)
                )
                await self._open.wait()
                if up:
                    data = self._flip(data)
                    self.up_bytes += len(data)
                writer.write(data)
                await writer.drain()
                if up and self._cut_now(len(data)):
                    await self._reset()
                    return
            writer.close()

    def _cut_now(self, length_bytes: int) -> bool:
        if self._to_cut is None:
            self._to_cut = next(self.cuts, None)
        if self._to_cut is None:
            return False
        self._to_cut -= length_bytes
        if self._to_cut > 0:
            return False
        self._to_cut = None
        return True

    def _flip(self, data: bytes) -> bytes:
        if self._to_flip is None:
            self._to_flip = next(self.flips, None)
        if self._to_flip is None:
            return data
        if self._to_flip >= len(data):
            self._to_flip -= len(data)
            return data
        damaged = bytearray(data)
        damaged[self._to_flip] ^= 0x10
        self._to_flip, self.flipped = None, self.flipped + 1
        return bytes(damaged)
