"""Write every key's default into ``pyproject.toml``, where ``flwr run`` looks for them: ``python -m sims.defaults``."""

from __future__ import annotations

from pathlib import Path

import tomli_w

from fedkd.config import Scalar, defaults

BEGIN, END = "# keys: begin (written by `make config` from fedkd/config.py and fedkd/methods)\n", "# keys: end\n"


def flower_section() -> str:
    """Return the ``[tool.flwr.app.config.*]`` tables with every key and its default."""
    tables: dict[str, dict[str, Scalar]] = {}
    for key, value in defaults().items():
        section, name = key.split(".", 1)
        tables.setdefault(section, {})[name] = value
    return "\n".join(
        f"[tool.flwr.app.config.{section}]\n{tomli_w.dumps(table)}" for section, table in tables.items() if table
    )


def main(path: Path = Path("pyproject.toml")) -> None:
    """Replace what stands between the two marks."""
    head, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    tail = rest.partition(END)[2]
    path.write_text(f"{head}{BEGIN}{flower_section()}{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
