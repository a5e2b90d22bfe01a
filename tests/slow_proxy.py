"""A TCP proxy on loopback that holds every answer back: `python -m tests.slow_proxy PORT TO_PORT DELAY_S`."""

import asyncio
import sys

_CHUNK = 1 << 16


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
    try:
        while data := await reader.read(_CHUNK):
            await asyncio.sleep(delay_s)
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()


async def _serve(port: int, to_port: int, delay_s: float) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, requests = await asyncio.open_connection("127.0.0.1", to_port)
        both = _pass(reader, requests, 0), _pass(answers, writer, delay_s)
        await asyncio.gather(*both, return_exceptions=True)  # either side may hang up

    async with await asyncio.start_server(connected, "127.0.0.1", port) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
