"""One script a question, the datasets they read, and their results."""

if __name__ == "benchmarks":
    raise ImportError("benchmarks must be a part of elbozoo; got the bare name. Write `import elbozoo.benchmarks`.")
