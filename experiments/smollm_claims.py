"""
What the claims become on SmolLM2-135M and real text: smollm.sh's runs, by the rule in verdicts.py.
"""
from statistics import mean

from results import column, of_study, phi
from verdicts import Claim

RUNS, METHODS = "smollm_runs.csv", "smollm_methods.csv"
SUBSPACES, PAIRS = "smollm_subspaces.csv", "smollm_subspaces_pairs.csv"
R4_AND_R64 = "lora-qv-r4 and lora-qv-r64"
R4, R64 = "lora-qv-r4 and lora-qv-r4", "lora-qv-r64 and lora-qv-r64"
# δ of what is no loss
OF_PHI, OF_SHARE, OF_RATIO = 0.05, 0.01, 0.1


def loss(name):
    """On 400 held-out rows of E2E."""
    return column(name, "score.valid_loss", RUNS)


def of_q(what):
    return of_study(SUBSPACES, "lora-qv-r4", what, target="q_proj")


def claims():
    """{name: the claim}"""
    found = [*of_losses(), *of_methods(), *of_subspaces()]
    return {claim.name: claim for claim in found}


def of_losses():
    def lower(name, groups, ours, control, **more):
        return Claim(name, groups, ours, control, smaller=True, **more)

    novels, mixture = "score.text_loss", "mean.loss.after"
    return [
        lower("as good as full", "loss, r = 16 and full", loss("lora"), loss("full"),
              kind="no worse"),
        lower("q, v: r = 1 enough", "loss on q and v, r = 1 and r = 64", loss("lora-qv-r1"),
              loss("lora-qv-r64"), kind="no worse"),
        lower("all: r = 1 enough", "loss on all seven, r = 1 and r = 16", loss("lora-all-r1"),
              loss("lora")[:2], kind="no worse"),
        lower("MLP better", "loss, MLP and attention", loss("lora-mlp"), loss("lora-attention")),
        lower("MultiLoRA better", "loss on five tasks, MultiLoRA and LoRA",
              column("multilora-mixture", mixture, RUNS), column("lora-mixture", mixture, RUNS)),
        lower("as good as r = k", "loss, found ranks and 16 everywhere", loss("autolora"),
              loss("lora"), kind="no worse"),
        lower("forgets less", "loss on novels (at whatever loss on E2E), LoRA and full",
              column("lora", novels, RUNS), column("full", novels, RUNS)),
    ]


def of_methods():
    def top1(name, over=None):
        return of_study(METHODS, name, "top1", over)

    return [
        Claim("less concentrated", "σ₁ / Σσ, MultiLoRA and LoRA", top1("multilora"), top1("lora"),
              OF_SHARE, smaller=True),
        Claim("full: less concentrated", "σ₁ / Σσ, full and LoRA", top1("full"), top1("lora"),
              OF_SHARE, smaller=True),
        Claim("full: less for its rank", "σ₁ / Σσ over its Gaussian's, full and LoRA",
              top1("full", "null.top1"), top1("lora", "null.top1"), OF_RATIO, smaller=True),
    ]


def of_subspaces():
    first, every = phi(PAIRS, R4_AND_R64, "first"), phi(PAIRS, R4_AND_R64, "all")
    by_chance = phi(PAIRS, R4_AND_R64, "all", "random")
    one_shared = [(1 + 3 * phi) / 4 for phi in by_chance]       # the first of 4 whole, 3 by chance
    projection, amplification = of_q("projection"), of_q("amplification")
    half_of_top = [top / 2 for top in of_q("top_W")]
    gaussian = mean(of_q("null.amplification"))
    return [
        Claim("top direction shared", "φ(1, 1) of r = 4 and 64, inputs, theirs and random ones'",
              first, phi(PAIRS, R4_AND_R64, "first", "random"), OF_PHI),
        Claim("φ above 0.5", "φ(1, 1), inputs, and 0.5", first, [0.5] * len(first), OF_PHI),
        Claim("no others shared", "φ(4, 64), inputs, theirs and random ones' with one shared",
              every, one_shared, OF_PHI, smaller=True, kind="no worse"),
        Claim("seeds share", "φ(1, 1) of two seeds of r = 64, inputs, theirs and random ones'",
              phi(PAIRS, R64, "first"), phi(PAIRS, R64, "first", "random"), OF_PHI),
        Claim("more for q", "φ(4, 4) of two seeds of r = 4, inputs, q and v",
              phi(PAIRS, R4, "all", target="q_proj"), phi(PAIRS, R4, "all", target="v_proj"),
              OF_PHI),
        Claim("more of W than random", "‖UᵀWV‖ at r = 4, ΔW's and a Gaussian's", projection,
              of_q("null.projection"), OF_PHI),
        Claim("not W's top", "‖UᵀWV‖, ΔW's and half of W's", projection, half_of_top, OF_PHI,
              smaller=True),
        Claim("amplifies", f"‖ΔW‖ / ‖UᵀWV‖ (a Gaussian's: {gaussian:.1f}) and 1", amplification,
              [1] * len(amplification), 1.0),
    ]
