"""Handwritten digits three ways: a closed-form network, an Extreme Learning Machine, and gradient descent.

    python examples/digits.py --plot demo.png

The data are scikit-learn's digits: 1,797 images of 8 x 8 pixels. 80 % of each class are fitted, the other 20 % are the
test (train_test_split with random_state=0, stratified). All three networks have one hidden layer of 100 ReLU units.
"""

import argparse
import statistics
import time

from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from platonic import PlatonicMLP, datasets, plots

WIDTHS = [10, 20, 50, 100, 200, 400]
SEEDS = [0, 1, 2]


def make_platonic(width, seed):
    return PlatonicMLP(width, random_state=seed)


def make_elm(width, seed):
    """The baseline: hidden weights are random and see no data."""
    return PlatonicMLP(width, projection="elm", random_state=seed)


def make_mlp(width, seed):
    """scikit-learn's network, trained by gradient descent (Adam) with its default settings."""
    return make_pipeline(StandardScaler(), MLPClassifier(width, random_state=seed))


METHODS = {
    "PlatonicMLP, closed form": make_platonic,
    "ELM, closed form, random weights": make_elm,
    "MLPClassifier, gradient descent": make_mlp,
}


def measure(make, width, data):
    """Fit once for each seed; medians of test accuracy, training accuracy and seconds of a fit."""
    runs = []
    for seed in SEEDS:
        model = make(width, seed)
        started = time.perf_counter()
        model.fit(data.X_train, data.y_train)
        seconds = time.perf_counter() - started
        runs.append((model.score(data.X_test, data.y_test), model.score(data.X_train, data.y_train), seconds))
    return [statistics.median(column) for column in zip(*runs, strict=True)]


def draw(path, data, width, widths, scores, mlp_score):
    """Upper part: what the layers of a deeper network make of the test images. Lower part: accuracy against width."""
    figure = plots.new_figure(10, 7.5)
    upper, lower = figure.subfigures(2, 1, height_ratios=[1, 1])
    deep = PlatonicMLP((2 * width, width, width), random_state=0).fit(data.X_train, data.y_train)
    upper.suptitle("test digits on the first two principal components of each layer of a closed-form network")
    plots.draw_representations(upper, deep, data.X_test, data.y_test)
    axes = lower.subplots()
    plots.draw_widths(axes, widths, scores, reference=("MLPClassifier (gradient descent)", width, mlp_score))
    axes.set_title("one hidden layer: test accuracy against width")
    axes.set_ylabel("test accuracy")
    plots.save_figure(figure, path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", metavar="FILE", help="save the figure here")
    parser.add_argument("--width", type=int, default=100, help="hidden units of the three networks (default: 100)")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="widths in the figure")
    args = parser.parse_args(argv)

    data = datasets.load("digits")
    make_platonic(10, 0).fit(data.X_train, data.y_train)  # the first fit in a process starts threads; it is not timed
    print(f"{data.description}; one hidden layer of {args.width} units\n")
    print(f"{'':38} test    train   seconds")
    results = {}
    for name, make in METHODS.items():
        test, train, seconds = results[name] = measure(make, args.width, data)
        print(f"{name:34} {test:8.4f} {train:8.4f} {seconds:9.3f}", flush=True)
    print(f"\nAccuracies, and seconds of a fit: medians of {len(SEEDS)} seeds.")

    if args.plot:
        closed_form = {"PlatonicMLP": make_platonic, "ELM (random weights)": make_elm}
        scores = {name: [measure(make, width, data)[0] for width in args.widths] for name, make in closed_form.items()}
        draw(args.plot, data, args.width, args.widths, scores, results["MLPClassifier, gradient descent"][0])
        print(f"Figure: {args.plot}")


if __name__ == "__main__":
    main()
