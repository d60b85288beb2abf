"""What a text-to-image model of emoji is worth. A judge is trained on the training pictures alone, for style and for
concept; its accuracy on the held-out pictures, which neither it nor the model has seen, stands beside its verdicts.
Then 1,000 captions that were trained on and 1,000 that were held out are drawn and judged. Writes
data/results/emoji.json, and -seen.jpg and -held-out.jpg beside it.

    python -m ldm_nb.datasets.emoji --out EMOJI
    python tests/prove/emoji_text.py --data EMOJI --model RUN
    python tests/prove/emoji_text.py --data EMOJI --model RUN --steps 20 --n 20 --out runs/tiny.json    in miniature

What is in the --work folder is not trained again."""
import argparse, json, time
from pathlib import Path
import torch
import torch.nn.functional as F
from torch import nn
from ldm_nb.cli.common import save_grid
from ldm_nb.core import LatentDiffusion
from ldm_nb.datasets.images import to_float
from ldm_nb.datasets.sources import load_images
from ldm_nb.engine.devices import has_fast_bf16
from ldm_nb.engine.files import atomic_path
from ldm_nb.engine.seeds import generator
from ldm_nb.metrics.distances import fid
from ldm_nb.metrics.intervals import wilson

FAST = has_fast_bf16(torch.device('cpu'))

def part(folder: Path) -> dict: # image (n, 3, 64, 64) uint8; concept, style, caption: lists in their order
    data = load_images(str(folder), 64, 10**6, 0, quiet=True)
    rows = {r['file_name']: r for r in map(json.loads, (folder/'metadata.jsonl').read_text().splitlines())}
    return dict(image=data['image'], caption=data['caption'],
                **{k: [rows[f][k] for f in data['file']] for k in ('concept', 'style')})

def conv(i: int, o: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())

class Twice(nn.Module): # a residual block
    def __init__(self, ch: int):
        super().__init__()
        self.body = nn.Sequential(conv(ch, ch), nn.Conv2d(ch, ch, 3, 1, 1, bias=False), nn.BatchNorm2d(ch))

    def forward(self, x): return F.relu(x + self.body(x))

class Judge(nn.Module):
    def __init__(self, concepts: int, styles: int):
        super().__init__()
        self.features = nn.Sequential(conv(3, 32, 2), conv(32, 64, 2), Twice(64), conv(64, 128, 2), Twice(128),
                                      conv(128, 256, 2), Twice(256), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.concept = nn.Sequential(nn.Dropout(.3), nn.Linear(256, concepts))
        self.style = nn.Linear(256, styles)

    def forward(self, x): # b 3 64 64 in [-1, 1] -> b concepts, b styles
        h = self.features(x)
        return self.concept(h), self.style(h)

def disturbed(x, rng): # b 3 64 64: shifted, scaled, turned a little, recoloured, a square of it covered
    b = len(x)
    u = lambda low, high, *shape: low + (high - low)*torch.rand(b, *shape, generator=rng)
    angle, scale, shift = u(-.2, .2), u(.85, 1.25), u(-.12, .12, 2)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()], 1), torch.stack([angle.sin(), angle.cos()], 1)], 1)
    grid = F.affine_grid(torch.cat([turn*scale[:, None, None], shift[:, :, None]], 2), x.shape, align_corners=False)
    x = F.grid_sample(x - 1, grid, align_corners=False) + 1           # white outside
    x = (1 - (1 - x)*u(.7, 1.2, 3, 1, 1)).clamp(-1, 1)
    y, at = torch.arange(64), u(0, 64, 2, 1)
    near = lambda k: ((y - at[:, k]).abs() < 7)
    return torch.where((near(0)[:, :, None] & near(1)[:, None, :])[:, None], torch.ones(()), x)

def train_judge(data: dict, concepts: list, styles: list, steps: int, batch_size: int = 64) -> Judge:
    torch.manual_seed(0)
    judge = Judge(len(concepts), len(styles)).train()
    x = data['image']
    c = torch.tensor([concepts.index(v) for v in data['concept']])
    s = torch.tensor([styles.index(v) for v in data['style']])
    opt = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(opt, 3e-3, steps, pct_start=.1)
    for step in range(steps):
        rng = generator(2, step)
        i = torch.randint(len(x), (batch_size,), generator=rng)
        with torch.autocast('cpu', torch.bfloat16, enabled=FAST):
            concept, style = judge(disturbed(to_float(x[i]), rng))
        loss = F.cross_entropy(concept.float(), c[i], label_smoothing=.1) + .3*F.cross_entropy(style.float(), s[i])
        opt.zero_grad(); loss.backward(); opt.step(); rate.step()
        if step % 500 == 0: print(f'judge: step {step}, loss {loss.item():.3f}', flush=True)
    return judge.eval()

@torch.no_grad()
def verdicts(judge: Judge, x: torch.Tensor, data: dict, concepts: list, styles: list) -> tuple[dict, torch.Tensor]:
    "Shares of right styles, of right concepts, and of concepts among the first five; the features."
    h = torch.cat([judge.features(p) for p in x.split(250)])
    c = torch.tensor([concepts.index(v) for v in data['concept']])
    s = torch.tensor([styles.index(v) for v in data['style']])
    first = judge.concept(h).topk(5).indices
    rows = dict(style=judge.style(h).argmax(1) == s, concept=first[:, 0] == c, five=(first == c[:, None]).any(1))
    share = lambda v: [round(k, 4) for k in (v.float().mean().item(), *wilson(v.float().mean().item(), len(v)))]
    return {k: share(v) for k, v in rows.items()}, h.double()

def nearest(x: torch.Tensor, data: dict, asked: dict) -> dict: # drawn; trained on; what was asked for
    "Is it memory? Distances in 16x16 pixels, root mean square of [-1, 1]."
    small = lambda x: F.interpolate(x, (16, 16), mode='area').flatten(1)
    every = small(to_float(data['image']))
    distance = torch.cdist(small(x), every)/every.shape[1]**.5
    at, close = distance.argmin(1), distance.amin(1)
    concept, style = (torch.tensor([data[k][i] == w for i, w in zip(at.tolist(), asked[k])])
                      for k in ('concept', 'style'))
    return dict(distance=round(close.median().item(), 4), same_concept=round(concept.float().mean().item(), 4),
                same_pair=round((concept & style).float().mean().item(), 4))

def some(data: dict, n: int, seed: int) -> dict:
    i = torch.randperm(len(data['image']), generator=generator(seed, 9))[:n]
    return {k: v[i] if torch.is_tensor(v) else [v[j] for j in i.tolist()] for k, v in data.items()}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, required=True, help='folder of python -m ldm_nb.datasets.emoji')
    p.add_argument('--model', required=True, help='a text model trained on FOLDER/train')
    p.add_argument('--work', type=Path, default=Path('runs/emoji-judge'))
    p.add_argument('--steps', type=int, default=8000, help="of the judge (default 8000)")
    p.add_argument('--n', type=int, default=1000, help='captions of each kind (default 1000)')
    p.add_argument('--sampling-steps', type=int, default=25)
    p.add_argument('--guidance', type=float, nargs='+', default=[3.])
    p.add_argument('--seed', type=int, default=2024)
    p.add_argument('--out', type=Path, default=Path('data/results/emoji.json'))
    a = p.parse_args()
    torch.set_num_threads(1)
    train, held = part(a.data/'train'), part(a.data/'held-out')
    concepts, styles = sorted({*train['concept'], *held['concept']}), sorted({*train['style']})
    judge, file, start = Judge(len(concepts), len(styles)), a.work/'judge.pt', time.time()
    if file.is_file(): judge.load_state_dict(torch.load(file, weights_only=True)['weights'])
    else:
        judge = train_judge(train, concepts, styles, a.steps)
        a.work.mkdir(parents=True, exist_ok=True)
        torch.save(dict(weights=judge.state_dict(), minutes=(time.time() - start)/60), file)
    minutes = torch.load(file, weights_only=True)['minutes']
    judge.eval()
    kinds = dict(seen=train, held_out=held)
    real = {k: verdicts(judge, to_float(d['image']), d, concepts, styles) for k, d in kinds.items()}
    known = real['seen'][1]
    mixed = torch.randperm(len(known), generator=generator(a.seed, 1))
    command = f'python tests/prove/emoji_text.py --data EMOJI --model {Path(a.model).name} --n {a.n}'
    out = dict(command=command, seed=a.seed, device='cpu', threads=1,
               pictures=dict(train=len(known), held_out=len(held['image'])),
               concepts=len(concepts), styles=styles,
               judge=dict(steps=a.steps, minutes=round(minutes, 1), held_out=real['held_out'][0],
                          trained_on=real['seen'][0],
                          fid_of_real=round(fid(known[mixed[a.n:]], known[mixed[:a.n]]).item(), 2)))
    asked = some(held, a.n, a.seed) # as far as pictures are from each other that nobody copied
    out['judge']['nearest_of_real'] = nearest(to_float(asked['image']), train, asked)
    print(json.dumps(out['judge']), flush=True)
    ldm = LatentDiffusion.from_pretrained(a.model)
    for w in a.guidance:
        row = {}
        for kind, data in kinds.items():
            asked, start = some(data, a.n, a.seed), time.time()
            x = ldm.sample(asked['caption'], steps=a.sampling_steps, sampler='dpmpp_2m', guidance=w, seed=a.seed,
                           batch_size=50)
            row[kind], h = verdicts(judge, x, asked, concepts, styles)
            row[kind] |= dict(n=len(x), nearest=nearest(x, train, asked), fid=round(fid(known, h).item(), 2),
                              minutes=round((time.time() - start)/60, 1))
            print(w, kind, json.dumps(row[kind]), flush=True)
            if w == a.guidance[0]:
                save_grid(x[:64], a.out.with_name(f'{a.out.stem}-{kind.replace("_", "-")}.jpg'))
        out.setdefault('drawn', {})[str(w)] = row
    with atomic_path(a.out) as path: path.write_text(json.dumps(out, indent=1) + '\n')

if __name__ == '__main__': main()
