"""What a trace finds in tiers, as a picture."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from kvstore.errors import missing
from kvstore.values import format_size, lasting


def pyplot() -> Any:
    """That of matplotlib, without a screen. Raises NoPackage: it is not there."""
    try:
        import_module("matplotlib").use("Agg")
        return import_module("matplotlib.pyplot")
    except ImportError as e:
        raise missing("a picture", "plot", e) from e


def draw(told: dict[str, Any], title: str, path: Path) -> None:
    """Draw what `capacity.simulate` told. Raises OSError: the file cannot be written."""
    figure, ((rates, ages), (costs, disks)) = pyplot().subplots(2, 2, figsize=(11, 7))
    figure.suptitle(title, fontsize=10, x=0.02, ha="left")
    sizes = [row["memory"] / (1 << 30) for row in told["sizes"]]
    colours = {"lru": "#30638e", "forecast": "#d1495b"}

    rates.set_title("How much for how much", loc="left", fontsize=10)
    bound = [100 * row["clairvoyant"] for row in told["sizes"]]
    rates.plot(sizes, bound, color="#aaaaaa", label="who knows the future")
    for name, colour in colours.items():
        found = [100 * row["found"][name] for row in told["sizes"]]
        rates.plot(sizes, found, color=colour, marker="o", label=name)
        dollars = [row["dollars"][name] for row in told["sizes"]]
        costs.plot(sizes, dollars, color=colour, marker="o", label=f"memory, {name}")
    rates.axhline(100 * told["ceiling"], color="#999999", ls=":", label="room for everything")
    rates.set_ylabel("blocks found, %")

    ages.set_title("Which time to live", loc="left", fontsize=10)
    lives = list(told["reuse"])
    ages.plot(lives, [100 * part for part in told["reuse"].values()], color="#30638e", marker="o")
    ages.set_xscale("log")
    ages.set_xticks(lives, [lasting(life) for life in lives], fontsize=8)
    ages.minorticks_off()
    ages.set_ylim(0, 103)
    ages.set_xlabel("since the last use")
    ages.set_ylabel("reuse within, %")

    costs.set_title("What a saved token costs", loc="left", fontsize=10)
    costs.axhline(told["computing_dollars"], color="#444444", ls=":", label="computing it")
    costs.set_yscale("log")
    costs.set_ylabel("$ per million tokens")
    for axes in (rates, costs):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [format_size(size * (1 << 30)) for size in sizes], fontsize=8)
        axes.set_xlabel("of memory")
        axes.legend(fontsize=8)

    disks.set_title("What is found below memory, and what it wears", loc="left", fontsize=10)
    for number, row in enumerate(reversed(told["below"])):
        left = 0.0
        for part, colour in (("memory", "#edae49"), ("disk", "#66a182"), ("shared", "#30638e")):
            width = 100 * row["found_in"][part]
            disks.barh(number, width, left=left, color=colour, label=None if number else part)
            left += width
        if row["written_daily"]:
            text = f" {row['written_daily'] / (1 << 40):.3g} TiB a day"
            disks.text(left, number, text, fontsize=8)
    names = [scene(row).replace("disk +", "disk\n+") for row in reversed(told["below"])]
    disks.set_yticks(range(len(names)), names, fontsize=8)
    disks.set_xlim(0, 140 * told["ceiling"] or 1)
    disks.set_xlabel("blocks found, %")
    disks.legend(fontsize=8, loc="upper right")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path, dpi=100, format="png")


def scene(row: dict[str, Any]) -> str:
    """Tiers in a few words."""
    text: str = f"{row['nodes']} nodes: " * (row["nodes"] > 1) + format_size(row["memory"])
    if row["disk"]:
        text += f" + {format_size(row['disk'])} disk" + ", reused" * (row["write"] == "reused")
    return text + (f" + {format_size(row['shared'])} shared" if row["shared"] else "")
