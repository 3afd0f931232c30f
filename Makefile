.PHONY: quality style test slow

quality:  ## what CI checks besides the tests
	ruff check .
	ruff format --check .

style:  ## mend what can be mended
	ruff check --fix .
	ruff format .

test:
	pytest

slow:
	pytest -m slow
