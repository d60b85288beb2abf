"""Pairs that training never showed together: a small text-to-image model is trained on postcards in which each
colour of house lacks one season, a different one for each colour, and is then asked for all pairs. Chapter
paper/11_captions reads data/results/holdout.json and holdout.jpg.

    python tests/prove/holdout.py  a training of 3,000 steps and 1,024 pictures: on one thread an hour
    python tests/prove/holdout.py --device cuda --batch-size 64  four times the pictures a step, in a few minutes
    python tests/prove/holdout.py --train  only the training, and what it said of 64 pictures at six times

A model that is in the work folder is not trained again; a training that was stopped goes on."""
import argparse, json, shlex, sys, time
from pathlib import Path
import numpy as np
import torch
from einops import rearrange
from PIL import Image
from ldm_nb.core import LatentDiffusion
from ldm_nb.engine.cost import this_machine
from ldm_nb.datasets.captions import SEASON_WORDS, TIME_WORDS, on_a_hill
from ldm_nb.datasets.images import to_float, to_uint8
from ldm_nb.datasets.scenes import HOUSES, SEASONS, TIMES, random_scene, render
from ldm_nb.engine.files import atomic_path
from ldm_nb.metrics.reader import load_reader, read
from ldm_nb.cli.recipes import train_diffusion
from ldm_nb.engine.devices import pick_device

COLOURS = HOUSES[1:]
# every colour lacks one season, every season one colour
HELD = dict(red='winter', yellow='autumn', blue='summer', white='spring')

def scene_of(rng: np.random.Generator, **fixed):
    "A house, up to two trees, nothing else: a small world is learnt in few steps."
    return random_scene(rng, **dict(house=COLOURS[rng.integers(4)], trees=int(rng.integers(3)), mountains=False,
                                    clouds=False, lake=False) | fixed)

def said(scene, rng: np.random.Generator) -> str: # 'a red house on a snowy hill at night'
    words = [table[v][rng.integers(2)] for table, v in ((TIME_WORDS, scene.time), (SEASON_WORDS, scene.season))]
    return on_a_hill(*words, f'a {scene.house} house', [])

def write(folder: Path, n: int, seed: int) -> int: # of pictures that were left out
    "A folder of n pictures with captions, none of them of a held-out pair."
    (folder/'pictures').mkdir(parents=True, exist_ok=True)
    rows, out, i = [], 0, 0
    while len(rows) < n:
        rng = np.random.default_rng([seed, 77, i])
        scene, i = scene_of(rng), i + 1
        if HELD[scene.house] == scene.season:
            out += 1
            continue
        name = f'{len(rows):05}.png'
        Image.fromarray(render(scene)['image']).save(folder/'pictures'/name)
        rows.append(dict(file_name=name, text=said(scene, rng)))
    with atomic_path(folder/'pictures'/'metadata.jsonl') as p: p.write_text(''.join(json.dumps(r) + '\n' for r in rows))
    return out

def questions(each: int, seed: int) -> list: # of (scene, caption): every colour, season and time, `each` times
    out = []
    for k in range(4*4*4*each):
        rng = np.random.default_rng([seed, 78, k])
        scene = scene_of(rng, house=COLOURS[k % 4], season=SEASONS[k//4 % 4], time=TIMES[k//16 % 4])
        out.append((scene, said(scene, rng)))
    return out

def answers(reader, x, scenes: list
    ) -> list: # for each pair: what was asked, in how many pictures, and what was seen in them
    rows = []
    for house in COLOURS:
        for season in SEASONS:
            saw = [(s.time, r) for s, r in zip(scenes, read(reader, x)) if (s.house, s.season) == (house, season)]
            count = lambda right: sum(map(right, saw))
            rows.append(dict(house=house, season=season, held_out=HELD[house] == season, n=len(saw),
                             colour=count(lambda r: r[1]['house'] == house),
                             right_season=count(lambda r: r[1]['season'] == season),
                             time=count(lambda r: r[1]['time'] == r[0]),
                             both=count(lambda r: (r[1]['house'], r[1]['season']) == (house, season)),
                             drawn={h: count(lambda r: r[1]['house'] == h) for h in HOUSES}))
    return rows

def share(rows: list, held: bool, what: str = 'both') -> float:
    some = [r for r in rows if r['held_out'] == held]
    return sum(r[what] for r in some)/sum(r['n'] for r in some)

def write_table(path: Path, table: dict):
    with atomic_path(path) as p: p.write_text(json.dumps(table, indent=1, allow_nan=False) + '\n')

HOW = dict(steps=20, guidance=3., sampler='dpmpp_2m')

def train(a, reader, asked: list):
    "The model of the small world, in a.work/model; nothing where there is one."
    if not (a.work/'pictures'/'metadata.jsonl').is_file():
        print(f'left out {write(a.work, a.n, a.seed)} pictures of held-out pairs', flush=True)
    if (a.work/'model'/'config.json').is_file(): return
    scenes, captions = zip(*asked[:64])
    def watch(ldm, step): # one picture of each question of the first round
        rows = answers(reader, ldm.sample(list(captions), **HOW | dict(steps=10, seed=a.seed)), scenes)
        return {f'{k} {w}': round(share(rows, h, w), 3) for h, k in ((True, 'held out'), (False, 'seen'))
                for w in ('colour', 'both')}
    train_diffusion(a.work/'model', data=str(a.work/'pictures'), preset='small', condition='text', watch=watch,
                    resume=True, device=a.device, precision='fp32' if a.device == 'cpu' else None, steps=a.steps,
                    batch_size=a.batch_size, n=a.n, seed=a.seed, save_every=max(1, a.steps//6),
                    channels_last=True, quiet=True)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--n', type=int, default=8000, help='pictures to train on (default 8000)')
    p.add_argument('--steps', type=int, default=3000, help='of training (default 3000)')
    p.add_argument('--each', type=int, default=8, help='pictures of each colour, season and time (default 8)')
    p.add_argument('--batch-size', type=int, default=16, help='of training (default 16)')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--device', default='cpu', help='cpu or cuda (default cpu)')
    p.add_argument('--train', action='store_true', help='only train, and write what was seen on the way')
    p.add_argument('--work', type=Path, default=Path('runs/holdout'))
    p.add_argument('--out', type=Path, default=Path('data/results/holdout.json'), help='a picture goes beside it')
    a, start = p.parse_args(), time.time()
    torch.set_num_threads(1)
    train(a, reader := load_reader(), asked := questions(a.each, a.seed))
    scenes, captions = zip(*asked)
    how, trained = HOW | dict(seed=a.seed), a.work/'model'
    log = [json.loads(line) for line in (trained/'log.jsonl').read_text().splitlines()]
    said_so = dict(command=shlex.join(['python', 'tests/prove/holdout.py', *sys.argv[1:]]), held_out=HELD,
                   device=this_machine(pick_device(a.device))['name'], seed=a.seed, sampling=how,
                   curve=[{k: v for k, v in r.items() if k != 'loss'} for r in log if 'seen both' in r])
    if a.train:
        write_table(a.out, said_so | dict(sampling=how | dict(steps=10)))
        raise SystemExit
    card = json.loads((trained/'config.json').read_text())['card']
    models = {'trained without them': LatentDiffusion.from_pretrained(trained),
              'postcards-text': LatentDiffusion.from_pretrained('postcards-text')}
    for ldm in models.values(): ldm.to(a.device)
    x = ({k: ldm.sample(list(captions), **how) for k, ldm in models.items()} |
         {'real': to_float(np.stack([render(s)['image'] for s in scenes]))})
    table = {k: answers(reader, v, scenes) for k, v in x.items()}
    for k, rows in table.items():
        print(k, {h: {w: round(share(rows, h == 'held out', w), 3) for w in ('colour', 'right_season', 'time', 'both')}
                  for h in ('held out', 'seen')}, flush=True)
    noon = rearrange(x['trained without them'][16:32], '(season colour) c h w -> c (season h) (colour w)', colour=4)
    Image.fromarray(to_uint8(noon)).save(a.out.with_suffix('.jpg'), quality=90)
    write_table(a.out, said_so | dict(card=card, seconds=round(time.time() - start, 1), models=table))
    print(f'wrote {a.out} after {(time.time() - start)/60:.1f} minutes')
