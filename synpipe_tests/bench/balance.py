"""Compare ways to weigh unequal classes: `python -m synpipe_tests.bench.balance`; takes half a minute.

The vectors are simulated: a centre per class, an offset per neuron, and noise per synapse. The classes are as unequal as
those of FAFB (Eckstein et al. 2024: 397, 165, 32, 83, 5, 5 neurons; 47,767 … 1,879 synapses), with ten times fewer synapses.
The split is by neuron: one in five neurons is for testing and one in ten for validation, at least one each. Figures are means
over seeds.
"""

import numpy as np

from synpipe.analysis.linear_probe import Balance, fit_probe
from synpipe.analysis.metrics import class_recalls
from synpipe.datasets import NEUROTRANSMITTERS

NEURONS = (397, 165, 32, 83, 5, 5)
SYNAPSES = (4777, 3236, 727, 951, 473, 188)
SEEDS = 20
METHODS: tuple[Balance, ...] = ("balanced", "log", "none")


def vectors_of_neurons(seed: int, dimensions: int = 64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Simulate vectors, float32 (n, d), with the class code and the neuron of each synapse."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(len(NEURONS), dimensions)) * 0.35
    rows, codes, neurons = [], [], []
    for code, (count, total) in enumerate(zip(NEURONS, SYNAPSES, strict=True)):
        shares = random.lognormal(0, 1, count)
        for share in shares / shares.sum():
            size = max(1, round(share * total))
            place = centres[code] + random.normal(size=dimensions) * 0.4
            rows.append(place + random.normal(size=(size, dimensions)))
            codes += [code] * size
            neurons += [len(rows)] * size
    return np.concatenate(rows).astype(np.float32), np.array(codes), np.array(neurons)


def recalls(seed: int, balance: Balance) -> tuple[np.ndarray, float]:
    """Return the recall of each class on the test side, and the accuracy."""
    vectors, codes, neurons = vectors_of_neurons(seed)
    random = np.random.default_rng(seed + 1000)
    test, validation = np.zeros(len(codes), bool), np.zeros(len(codes), bool)
    for code in np.unique(codes):
        members = random.permutation(np.unique(neurons[codes == code]))
        here, there = max(1, len(members) // 5), max(1, len(members) // 10)
        test |= np.isin(neurons, members[:here])
        validation |= np.isin(neurons, members[here : here + there])
    training = ~(test | validation)
    probe = fit_probe(vectors[training], codes[training], vectors[validation], codes[validation], len(NEURONS), balance)
    predicted = probe.probabilities(vectors[test]).argmax(axis=1)
    return class_recalls(codes[test], predicted, len(NEURONS)), float((predicted == codes[test]).mean())


def main() -> None:
    print(
        f"{'':<10}{'balanced':>10}{'± s.e.':>8}{'accuracy':>10}  "
        + "".join(f"{name[:8]:>10}" for name in NEUROTRANSMITTERS)
    )
    for method in METHODS:
        results = [recalls(seed, method) for seed in range(SEEDS)]
        by_class = np.array([recall for recall, _ in results])
        balanced = by_class.mean(axis=1)
        error = balanced.std(ddof=1) / np.sqrt(SEEDS)
        columns = "".join(f"{value:>10.3f}" for value in by_class.mean(axis=0))
        print(
            f"{method:<10}{balanced.mean():>10.3f}{error:>8.3f}{np.mean([accuracy for _, accuracy in results]):>10.3f}  {columns}"
        )


if __name__ == "__main__":
    main()
