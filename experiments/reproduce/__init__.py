"""The published tables beside ours: recipe files in, result files and docs/results.md out.

`torch-bregman reproduce` runs it (`command.run`). recipes → the rows; running → a process per run, child in each of
them, variance where nothing is trained; results → the result files; cells and page → what they say, curves and
architecture → their pictures.
"""
