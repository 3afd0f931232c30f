.PHONY: quality style test slow

quality:  ## what CI checks besides the tests
	ruff check .
	ruff format --check .
	mypy

style:  ## mend what can be mended
	ruff check --fix .
	ruff format .

test:
	pytest -n 2 --dist loadfile

slow:
	pytest -m slow
