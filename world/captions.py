"""Words for scenes: varied English from templates and synonyms, and the vocabulary a reader can write prompts with.

The first synonym of each list is the plain word. A prompt that stays near these words is understood; word order and the
choice of sentence are free.
"""

from __future__ import annotations

import random
import re

from world.puppet import ACTIONS, BACKGROUNDS, BODY_COLOURS, PROPS, SPEEDS, Scenes, sample_scenes

# Colours of the puppet and of its prop.
COLOUR_WORDS = {
    "red": ("red", "crimson", "scarlet", "ruby"),
    "orange": ("orange", "tangerine", "pumpkin"),
    "yellow": ("yellow", "golden", "lemon"),
    "green": ("green", "emerald", "leaf-green"),
    "teal": ("teal", "turquoise", "cyan"),
    "blue": ("blue", "cobalt", "sapphire"),
    "purple": ("purple", "violet", "plum"),
    "pink": ("pink", "fuchsia", "bubblegum"),
}
BACKGROUND_WORDS = {
    "cream": ("cream", "ivory", "vanilla"),
    "mint": ("mint", "pale green", "mint-green"),
    "sky blue": ("sky blue", "light blue", "pale blue"),
    "lavender": ("lavender", "lilac", "pale purple"),
    "rose": ("rose", "pale pink", "blush"),
    "grey": ("grey", "gray", "silver"),
    "navy": ("navy", "dark blue", "midnight"),
    "brown": ("brown", "chocolate", "coffee"),
}
PROP_WORDS = {
    "ball": ("ball", "rubber ball", "round ball"),
    "cube": ("cube", "box", "block"),
    "star": ("star", "five-pointed star", "little star"),
}
SUBJECT_WORDS = (
    "puppet",
    "marionette",
    "doll",
    "little figure",
    "toy",
    "character",
    "little puppet",
    "cheerful puppet",
)
SPEED_WORDS = {
    "slow": ("slowly", "gently", "in slow motion", "lazily"),
    "normal": ("", "", "at an easy pace", "steadily"),
    "fast": ("quickly", "fast", "briskly", "energetically"),
}
# (third person, participle)
ACTION_WORDS = {
    "wave": (
        ("waves", "waving"),
        ("waves hello", "waving hello"),
        ("waves one hand", "waving one hand"),
        ("greets us with a wave", "greeting us with a wave"),
    ),
    "walk": (
        ("walks", "walking"),
        ("walks to and fro", "walking to and fro"),
        ("strolls back and forth", "strolling back and forth"),
        ("paces up and down", "pacing up and down"),
    ),
    "jump": (
        ("jumps", "jumping"),
        ("hops on the spot", "hopping on the spot"),
        ("jumps up and down", "jumping up and down"),
        ("leaps into the air", "leaping into the air"),
    ),
    "squat": (
        ("squats", "squatting"),
        ("does squats", "doing squats"),
        ("does deep knee bends", "doing deep knee bends"),
        ("crouches and stands up again", "crouching and standing up again"),
    ),
    "dance": (
        ("dances", "dancing"),
        ("sways and dances", "swaying and dancing"),
        ("dances from side to side", "dancing from side to side"),
        ("grooves to music", "grooving to music"),
    ),
    "spin arms": (
        ("spins its arms", "spinning its arms"),
        ("swings its arms in circles", "swinging its arms in circles"),
        ("turns its arms like a windmill", "turning its arms like a windmill"),
        ("whirls both arms around", "whirling both arms around"),
    ),
    "bow": (
        ("bows", "bowing"),
        ("takes a bow", "taking a bow"),
        ("bows politely", "bowing politely"),
        ("bends forward in a bow", "bending forward in a bow"),
    ),
    "cheer": (
        ("cheers", "cheering"),
        ("cheers with both arms up", "cheering with both arms up"),
        ("throws its hands up in joy", "throwing its hands up in joy"),
        ("celebrates with raised arms", "celebrating with raised arms"),
    ),
    "kick": (
        ("kicks", "kicking"),
        ("kicks one leg out", "kicking one leg out"),
        ("swings a leg in a kick", "swinging a leg in a kick"),
        ("practises kicks", "practising kicks"),
    ),
    "improvise": (
        ("improvises", "improvising"),
        ("moves freely", "moving freely"),
        ("makes up its own moves", "making up its own moves"),
        ("moves in its own way", "moving in its own way"),
    ),
}
BACKGROUND_PHRASES = (
    "before a {} wall", "in front of a {} wall", "against a {} background", "in a {} room", "on a {} stage",
    "with a {} backdrop",
)  # fmt: skip
PROP_PHRASES = (
    "a {} bouncing beside it", "a {} bounces next to it", "with a {} bouncing at its side", "beside a bouncing {}",
    "next to a {}", "together with a {}",
)  # fmt: skip
OPENINGS = ("A video of", "A short clip of", "There is", "We see", "A cartoon of", "Show")
NO_PROP_PHRASES = ("alone", "all by itself", "with nothing beside it", "without any toys")


def captions(scenes: Scenes, seed: int, full: bool = False, *, looks: bool = True) -> list[str]:
    """One caption per scene; caption i depends on its scene, the seed and i.

    full=False: long and short forms, each attribute but the puppet's colour or action may be left unsaid, and so may
    one of those. full=True: body colour, background, action and the prop (or its absence) are all said, in varied
    words. looks=False: the action at most, nothing of what can be seen on a still.
    """
    columns = (scenes.body, scenes.background, scenes.action, scenes.speed, scenes.prop, scenes.prop_colour)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [_caption(row, random.Random(f"{seed}/{i}"), full, looks) for i, row in enumerate(rows)]


def _caption(row: tuple[int, ...], rng: random.Random, full: bool, looks: bool) -> str:
    body, background, action, speed, prop, prop_colour = row

    def said(probability: float) -> bool:
        return full or rng.random() < probability

    colour = rng.choice(COLOUR_WORDS[BODY_COLOURS[body]]) if said(0.92) else ""
    subject = rng.choice(SUBJECT_WORDS)
    finite, participle = rng.choice(ACTION_WORDS[ACTIONS[action]])
    says_action = said(0.95)
    pace = rng.choice(SPEED_WORDS[SPEEDS[speed]]) if says_action and said(0.75) else ""
    place = ""
    if said(0.8):
        words = rng.choice(BACKGROUND_WORDS[BACKGROUNDS[background]])
        place = _articled(rng.choice(BACKGROUND_PHRASES), words)
    company = ""
    if prop == 0:
        company = rng.choice(NO_PROP_PHRASES) if said(0.35) else ""
    elif said(0.9):
        thing = f"{rng.choice(COLOUR_WORDS[BODY_COLOURS[prop_colour]])} {rng.choice(PROP_WORDS[PROPS[prop]])}"
        company = _articled(rng.choice(PROP_PHRASES), thing)
    if not looks:
        colour = place = company = ""

    dressed = colour and rng.random() < 0.2
    who = f"{subject} dressed in {colour}" if dressed else f"{colour} {subject}".strip()
    who = f"the {who}" if rng.random() < 0.15 else _article(who)
    if rng.random() < 0.06:  # a made-up name is spelled in letters: unknown words are met in training, and mean nothing
        who += f" called {_name(rng)}"
    form = rng.random()
    if not says_action:
        parts = [who, place, company]
    elif form < 0.15 and place:
        lead = place[0].upper() + place[1:]
        return _finish([f"{lead}, {who} {finite} {pace}".strip(), company], rng, is_noun_phrase=False)
    elif form < 0.5:
        parts = [f"{who} {participle} {pace}".strip(), place, company]
    else:
        verb = f"is {participle}" if rng.random() < 0.3 else finite
        parts = [f"{who} {verb} {pace}".strip(), place, company]
    if parts[1] and rng.random() < 0.5:  # "waves before a mint wall" rather than "waves, before a mint wall"
        parts[:2] = [f"{parts[0]} {parts[1]}"]
    return _finish(parts, rng, is_noun_phrase=not says_action or form < 0.5)


def _finish(parts: list[str], rng: random.Random, is_noun_phrase: bool) -> str:
    text = ", ".join(part for part in parts if part)
    style = rng.random()
    if style < 0.4:
        text = text[0].upper() + text[1:] + "."
    elif style < 0.6 and is_noun_phrase:
        text = f"{rng.choice(OPENINGS)} {text}"
    return text


def _name(rng: random.Random) -> str:
    return "".join(rng.choice("bcdfghjklmnpqrstvwxyz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3))).title()


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _articled(phrase: str, words: str) -> str:
    """Fill the phrase; its "a" agrees with the word that follows."""
    return phrase.replace("a {}", _article(words)) if "a {}" in phrase else phrase.format(words)


# ---- reading captions back ----


def _pattern(words: dict[str, tuple[str, ...]]) -> tuple[str, dict[str, str]]:
    meaning = {synonym: name for name, synonyms in words.items() for synonym in synonyms}
    longest_first = sorted(meaning, key=len, reverse=True)
    return "|".join(re.escape(word) for word in longest_first), meaning


def claims(caption: str) -> dict[str, str]:
    """What a caption in our vocabulary says: body, background, action, prop, prop_colour; unsaid ones are absent.

    A prop of "none" is claimed only by words such as "alone". Used to check captions, and to tell a user what was
    understood.
    """
    text = caption.lower()
    found: dict[str, str] = {}
    colours, colour_of = _pattern(COLOUR_WORDS)
    grounds, ground_of = _pattern(BACKGROUND_WORDS)
    things, thing_of = _pattern(PROP_WORDS)
    subjects = "|".join(sorted(SUBJECT_WORDS, key=len, reverse=True))
    if match := re.search(rf"\b({grounds}) (?:wall|background|room|stage|backdrop)\b", text):
        found["background"] = ground_of[match[1]]
    if match := re.search(rf"\b({colours}) (?:{subjects})\b|\bdressed in ({colours})\b", text):
        found["body"] = colour_of[match[1] or match[2]]
    if match := re.search(rf"\b(?:({colours}) )?({things})\b", text):
        found["prop"] = thing_of[match[2]]
        if match[1]:
            found["prop_colour"] = colour_of[match[1]]
    elif re.search("|".join(NO_PROP_PHRASES), text):
        found["prop"] = "none"
    phrases = {form: action for action, forms in ACTION_WORDS.items() for pair in forms for form in pair}
    if match := re.search("|".join(sorted(phrases, key=len, reverse=True)), text):
        found["action"] = phrases[match[0]]
    return found


def vocabulary_sentences(n: int, seed: int = 0) -> list[str]:
    """n captions, half of them full, to train a tokenizer on."""
    scenes = sample_scenes(n, seed)
    half = n // 2
    return captions(scenes.select(slice(0, half)), seed, full=True) + captions(scenes.select(slice(half, n)), seed + 1)
