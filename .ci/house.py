"""The house: which folder holds what, and who may import whom. `story.py` checks it, `notebooks.py` walks through it.

A notebook nbs/PART/NN_name.ipynb exports the module ldm_nb/PART/name.py; one in nbs/story exports ldm_nb/name.py.
Readers go from folder to folder and, inside one, by the numbers in the names of the files. Modules have no numbers:
their order is that of their imports."""
import re
from pathlib import Path

PACKAGE = 'ldm_nb'

# The folders, in the order in which a reader meets them.
FOLDERS = ('story', 'paper', 'beyond', 'interop', 'engine', 'fast', 'metrics', 'lab', 'course', 'datasets', 'cli')

# Who may import whom: a module imports its own floor and lower ones. The lowest floor, the ground, holds no
# layer of its own, so the story can stand on it alone.
FLOORS = (('ground',), ('story',), ('datasets',), ('engine',), ('paper',), ('metrics',), ('beyond',), ('interop',),
          ('fast',), ('cli', 'lab', 'course'))
GROUND = {'engine.files', 'engine.seeds', 'engine.build'}

# Two modules hand on names of many parts. They are addresses for users; of our own modules, those from `metrics`
# upwards may use them.
DOORS = {'data', 'pretrained'}
DOORS_FROM = 'metrics'

# (module, part that it may import although that lies higher) -> the functions that may do so, one line each; None: any.
# `ldm.compile()` and `ldm.export_onnx()` are methods of the facade whose work is done above it; a request for a large
# image is refused by what the memory of a sample is counted with.
EXCEPTIONS = {('core', 'fast'): {'compile'}, ('core', 'interop'): {'export_onnx'}, ('request', 'engine'): None}
# The only module that imports others by name, from its closed table: `from_pretrained` must return models whose
# embedders and networks live in higher parts.
BY_NAME = {'engine.build'}

# Arrows that the floors would allow: samplers know no network, networks no sampler, the training loop no model. A name
# stands for a module or for a whole part.
NEVER = dict(samplers={'diffusion', 'unet', 'core'}, unet={'diffusion', 'samplers'}, autoencoder={'losses', 'training'},
             training={'unet', 'autoencoder', 'core', 'attention', 'embedders'}, engine={'core'}, cli={'lab', 'course'},
             lab={'course'}, course={'fast', 'cli', 'lab'})

# A reader's patience: the modules of the story, the doors left out.
MODULE_LINES, STORY_LINES, CLASS_LINES = 260, 3000, dict(core=('LatentDiffusion', 150), training=('Trainer', 150))
COLUMNS, WIDE_SHARE = 100, .01 # at most this share of the story's lines may be wider
MAX_BYTES = 1_200_000 # of a notebook, outputs kept


def part_of(module: str) -> str: # 'engine.cache' -> 'engine'; 'core' -> 'story'
    if module in GROUND: return 'ground'
    first = module.split('.')[0]
    return first if '.' in module or first in FOLDERS else 'story'


def floor_of(module: str) -> int: # 0 is the ground
    return next((k for k, parts in enumerate(FLOORS) if part_of(module) in parts), len(FLOORS))


def forbidden(module: str, other: str) -> bool: # by the table of arrows that must not be
    return any(other in NEVER.get(me, ()) or part_of(other) in NEVER.get(me, ()) for me in (module, part_of(module)))


def reading_order(path: Path, nbs: Path
    ) -> tuple: # a key for sorting: by folder, then by number; the index last, because it may show what the others make
    inside = path.relative_to(nbs)
    folder = inside.parts[0] if len(inside.parts) > 1 else ''
    place = FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS) + (folder == '')
    number = re.match(r'(\d+)(\w?)_', inside.name)
    return (place, inside.parent.as_posix(), int(number[1]) if number else 10**6,
            number[2] if number else '', inside.name)


def notebooks(nbs: Path) -> list[Path]: # all that nbdev sees, in the order in which they are read
    seen = [p for p in nbs.rglob('*.ipynb') if not any(o[0] in '_.' for o in p.relative_to(nbs).parts)]
    return sorted(seen, key=lambda p: reading_order(p, nbs))


def address(path: Path, nbs: Path) -> str: # how a notebook is called: 'story/06_unet'
    return path.relative_to(nbs).with_suffix('').as_posix()
