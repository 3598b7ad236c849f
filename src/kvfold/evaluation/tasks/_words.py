"""Words to make keys, names and values of: short lists of our own, and those of the package wonderwords."""

from functools import cache
from importlib.resources import files


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CITIES = _listed(
    "Lisbon Oslo Nairobi Quito Hanoi Dublin Havana Prague Tunis Lima Seoul Vienna Riga Dakar Cairo Athens Bergen "
    "Bogota Toronto Osaka Geneva Madrid Tallinn Windhoek Reykjavik Sofia Kampala Zagreb Denver Mumbai Sydney Bergamo "
    "Montreal Helsinki Glasgow Porto Naples Boston Lyon Ankara Accra Jakarta Warsaw Kyoto Seville Turin Antwerp "
    "Auckland Marseille Calgary Leipzig Krakow Salvador Perth Bristol Valencia Durban Medellin Busan Malmo"
)
ADJECTIVES = _listed(
    "amber brave calm copper crimson curious early electric faithful fancy gentle giant golden happy hidden hollow "
    "icy jolly kind lively loud lucky mellow misty narrow nimble olive patient plain polite proud purple quick quiet "
    "rapid rusty scarlet shiny silent silver simple sleepy smooth solar spicy steady stormy sunny tender tidy tiny "
    "velvet violet warm wild windy wise wooden young"
)
NOUNS = _listed(
    "anchor badger basket beacon blossom bottle bridge butter candle canyon castle cedar cello clover comet cookie "
    "cricket dolphin dragon eagle falcon feather fiddle forest garden ginger glacier guitar hammer harbor helmet "
    "island jacket kettle kitten ladder lantern lemon lizard magnet marble meadow mirror monkey needle orchid otter "
    "paddle panther pebble pepper pigeon pillow planet pocket puzzle rabbit ribbon river rocket saddle salmon "
    "shadow spider statue stream temple thunder tiger timber tunnel turtle valley walnut whistle window zebra"
)


@cache
def wonderwords(*kinds: str) -> tuple[str, ...]:
    """The distinct words of some kinds ("noun", "adjective", "verb"), in order: the lists that RULER draws from.

    Raises RuntimeError where the package is not installed.
    """
    try:
        assets = files("wonderwords.assets")
    except ModuleNotFoundError:
        raise RuntimeError("RULER's keys and words are those of a package: pip install wonderwords") from None
    lists = [assets.joinpath(f"{kind}list.txt").read_text("utf-8").split("\n") for kind in kinds]
    return tuple(sorted({word.strip() for words in lists for word in words} - {""}))
