# make quickstart                                                 the whole method on a drawn data set
# make quickstart TRAIN=train.json VAL=val.json IMAGES=photos     the same on own photos (COCO JSON and image folder)
# make quickstart TRAIN=data.yaml                                 the same on a YOLO data set, or on a folder of Pascal VOC
# make quickstart TRAIN=... VAL=... IMAGES=... VAL_IMAGES=photos2    if the validation images are in another folder
# make quickstart ARGS="--out runs/mine optim.epochs=6"           more arguments of python -m headkd_ray.quickstart
# make test                                                       the tests
# make test-fast                                                  those that train nothing, in two minutes
# PYTHON=python3.12 make ...                                      chooses the Python (3.10 to 3.13) for the set-up

PY := .venv/bin/python
# Taken from the environment, where make puts them: pasted into the command, a quote in a name would end it.
OWN := $(if $(TRAIN),--train "$$TRAIN") $(if $(VAL),--val "$$VAL") $(if $(IMAGES),--images "$$IMAGES") \
	$(if $(VAL_IMAGES),--val-images "$$VAL_IMAGES")

# Tests that train nothing and start no Ray.
FAST := tests/job tests/data tests/report tests/golden tests/test_architecture.py tests/test_storage.py tests/test_text.py

# Two processes of pytest-xdist; tests/conftest.py says which tests stay together. (With ARGS="-n 0" it is one.)
TWO := -n 2 --dist loadgroup

.PHONY: setup quickstart test test-fast lint lock

quickstart: setup
	$(PY) -m headkd_ray.quickstart $(OWN) $(ARGS)

test: setup
	$(PY) -m pytest $(TWO) $(ARGS)

test-fast: setup
	$(PY) -m pytest $(FAST) $(ARGS)

setup:
	@sh setup.sh

lint: setup
	$(PY) -m ruff check --quiet .
	$(PY) -m ruff format --quiet --check .
	$(PY) -m mypy --no-error-summary

# Newest versions of all dependencies, for every Python and platform that we run on.
lock:
	$(PY) -m uv pip compile --quiet --universal --upgrade --python-version 3.10 --generate-hashes --no-emit-index-url \
		--custom-compile-command "make lock" --extra dev --extra hub --extra tune pyproject.toml -o requirements.lock
	@! grep -n "://" requirements.lock
