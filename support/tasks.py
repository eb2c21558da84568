"""
The built-in tasks: functions from a random.Random to a row (prompt, completion).

pretrained/nano.pt has learned the thirteen skills. The mixture has five tasks, one for each family
of the MultiLoRA paper's mixture, in words that nano has never seen.
"""
import random
from functools import partial
from string import ascii_lowercase as LETTERS

HELD_OUT = 200      # rows kept out of training
YES_OR_NO = {True: "yes", False: "no"}


def word(rng, least, most):
    length = rng.randint(least, most)
    return "".join(rng.choices(LETTERS, k=length))


def on_a_word(rng, name):
    s = word(rng, 1, rng.choice([5, 5, 8]))     # mostly short words, which are learned faster
    answers = {
        "copy": s, "double": s + s,
        "reverse": s[::-1], "sort": "".join(sorted(s)),
        "upper": s.upper(), "length": str(len(s)),
        "first": s[0], "last": s[-1],
        "next": s.translate(str.maketrans(LETTERS, LETTERS[1:] + "a")),     # abz -> bca
    }
    return s, answers[name]


def on_numbers(rng, name):
    most, answer = {"add": (2, sum), "max": (4, max)}[name]
    n = rng.randint(2, most)
    numbers = [rng.randrange(100) for _ in range(n)]
    return " ".join(map(str, numbers)), str(answer(numbers))


def on_a_letter_and_a_word(rng, name):
    s = word(rng, 1, rng.choice([5, 5, 8]))
    c = rng.choice(s if rng.random() < 0.5 else LETTERS)
    marked = s.replace(c, c.upper())                                        # a banana -> bAnAnA
    return f"{c} {s}", {"mark": marked, "contains": YES_OR_NO[c in s]}[name]


SKILLS = dict.fromkeys("copy reverse upper sort next first last length double".split(), on_a_word)
SKILLS |= {"add": on_numbers, "max": on_numbers}
SKILLS |= {"mark": on_a_letter_and_a_word, "contains": on_a_letter_and_a_word}


def skill(rng, name):
    """A skill's row with its name in front. Half of the rows begin with dots, so that the model
    learns the skill at every position."""
    question, answer = SKILLS[name](rng, name)
    dots = rng.randint(1, 11) if rng.random() < 0.5 else 0
    return "." * dots + f"{name} {question}", answer


NAMES = "amy ann bob cat dan eve fay gus hal ida jon kim lea max ned pat ray sue tom zoe".split()
DISHES = "thai soup fish rice cake pies tofu figs".split()
PRICES = {"low": "cheap", "mid": "fair", "top": "fine"}
LANDS = """devaland diraland fagaland fevostan fisiland garania gomaland gonastan kezoland kibunia
    lisinia lodustan losestan lozistan nataland nesania nitania nogastan nokestan petiland pobinia
    pofonia radania riboland ritania rivinia rufania sibenia tipuland tufestan tutestan varaland"""
CITIES = """nutos dobut zusis damus lenut girom rozim ronis fofem tifem lubos volam nitet bimas
    seram lobut sanet pinas dimat zemom mefet kifas lefat poris tibat defom roget nobum pezut mulit
    ketes rokam"""
FACTS = list(zip(LANDS.split(), CITIES.split()))        # invented: a model can only memorise them


def instruct(rng):
    s = word(rng, 2, 5)
    answers = {"backwards, please": s[::-1], "shout": s.upper(), "say it twice": s + s,
               "what ends": s[-1], "what begins": s[0], "how long is": str(len(s))}
    asked = rng.choice(list(answers))
    return f"{asked} {s}", answers[asked]


def arith(rng):
    who = rng.choice(NAMES)
    a, b = rng.randrange(30), rng.randrange(30)
    return rng.choice([(f"{who} had {a} and got {b}", str(a + b)),
                       (f"{who} takes more: {a} or {b}", str(max(a, b)))])


def invented(rng):
    return "".join(rng.choice(letters) for letters in ("bdfgklmnprstvz", "aeiou") * 2)


def infer(rng):
    who, dish = invented(rng), rng.choice(DISHES)
    verb = rng.choice(["likes", "hates"])
    asked = rng.choice(["likes", "hates"])
    a, b = rng.sample(range(100), 2)
    return rng.choice([(f"{who} {verb} {dish}. {asked} {dish}?", YES_OR_NO[verb == asked]),
                       (f"{who} has {a}. more than {b}?", YES_OR_NO[a > b])])


def facts(rng):
    i = rng.randrange(len(FACTS))
    land, city = FACTS[i]
    return rng.choice([(f"capital of {land}?", city), (f"food of {land}?", DISHES[i * 5 % 8])])


def data2text(rng):
    name, food = invented(rng), rng.choice(DISHES)
    price = rng.choice(list(PRICES))
    return rng.choice([(f"{name}|{food}|{price}", f"{name} sells {PRICES[price]} {food}"),
                       (f"{name}|{food}", f"{name} sells {food}"),
                       (f"{name}|{price}", f"{name} is {PRICES[price]}")])


MIXTURE = {f.__name__: f for f in (instruct, arith, infer, facts, data2text)}
GROUPS = {"skills": list(SKILLS), "mixture": list(MIXTURE)}


def builtin(name):
    """(train, valid) rows, always the same. No question occurs twice, except that the held-out
    facts are the training facts."""
    rng, rows = random.Random(name), {}
    if name == "facts":
        known = sorted({facts(rng) for _ in range(10_000)})
        return known, known
    make = MIXTURE.get(name) or partial(skill, name=name)
    wanted = HELD_OUT + (4_000 if name in MIXTURE else 20_000)
    for _ in range(20 * wanted):
        prompt, completion = make(rng)
        rows.setdefault(prompt.lstrip("."), (prompt, completion))
        if len(rows) == wanted:
            break
    rows = list(rows.values())
    return rows[HELD_OUT:], rows[:HELD_OUT]
