"""A folder of one's own, one sub-folder a class: one command trains a class-conditional model on it; is what it
draws of class k recognised as k by a classifier that was trained on real pictures? Writes
data/results/own-folder.json, and own-folder-1.jpg and -3.jpg (guidance 1 and 3).

    python tests/prove/own_folder.py --data FOLDER      20,000 pictures of CIFAR-10: about 50 minutes on one core

What is in the --work folder is not trained again."""
import argparse, json, subprocess, sys, time
from pathlib import Path
import torch
import torch.nn.functional as F
from PIL import Image
from ldm_nb.core import LatentDiffusion
from ldm_nb.datasets.images import to_float
from ldm_nb.engine.files import atomic_path
from ldm_nb.cli.common import save_grid
from ldm_nb.datasets.sources import load_images
from ldm_nb.engine.seeds import generator
from ldm_nb.metrics.intervals import wilson
from torch import nn

def block(i, o):
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2))

def plain(n_classes: int) -> nn.Module:
    "A plain convolutional network."
    torch.manual_seed(0)
    return nn.Sequential(block(3, 32), block(32, 64), block(64, 128), nn.Flatten(), nn.Dropout(.3),
                         nn.Linear(128*16, n_classes))

def classifier(net, images, labels, steps: int, batch_size: int = 64) -> nn.Module: # (n, 3, 32, 32) uint8, (n,)
    "Train it on shifted and mirrored pictures."
    opt = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, steps)
    for step in range(steps):
        rng = generator(1, step)
        i = torch.randint(len(images), (batch_size,), generator=rng)
        y, x = torch.randint(9, (2,), generator=rng).tolist()
        flip = torch.rand(batch_size, 1, 1, 1, generator=rng) < .5
        pictures = F.pad(to_float(images[i]), (4, 4, 4, 4), mode='reflect')[:, :, y:y+32, x:x+32]
        loss = F.cross_entropy(net(torch.where(flip, pictures.flip(-1), pictures)), labels[i], label_smoothing=.05)
        opt.zero_grad(); loss.backward(); opt.step(); rate.step()
    return net

@torch.no_grad()
def right(net, x, labels) -> torch.Tensor: # (b, 3, h, w) in [-1, 1] -> (b,) bool
    small = F.interpolate(x, size=(32, 32), mode='bilinear', antialias=True, align_corners=False)
    return torch.cat([net(part).argmax(1) for part in small.split(256)]) == labels

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, required=True, help='a folder with one sub-folder a class')
    p.add_argument('--work', type=Path, default=Path('runs/cifar'))
    p.add_argument('--each', type=int, default=50, help='drawn of each class (default 50)')
    p.add_argument('--steps', type=int, default=1500, help='of the classifier (default 1500)')
    p.add_argument('--train-steps', type=int, default=17000, help='of the diffusion model (default 17000)')
    p.add_argument('--guidance', type=float, nargs='+', default=[1., 1.5, 2., 3., 5.])
    p.add_argument('--out', type=Path, default=Path('data/results/own-folder.json'))
    a, start = p.parse_args(), time.time()
    command = ['ldm-train', 'diffusion', '--data', str(a.data), '--condition', 'class', '--preset', 'laptop',
               '--prediction-type', 'eps', '--logit-normal-share', '0', '--steps', str(a.train_steps),
               '--out', str(a.work)]
    if not (a.work/'config.json').is_file():
        subprocess.run([sys.executable, '-m', 'ldm_nb.cli.train', *command[2:],
                        *(['--resume'] if a.work.exists() else [])], check=True)
    real = load_images(str(a.data), 32, 20_000)
    names, kept = sorted(d.name for d in a.data.iterdir() if d.is_dir()), 2000
    judge = a.work/'classifier.pt'
    net = plain(len(names))
    if judge.is_file(): net.load_state_dict(torch.load(judge, weights_only=True))
    else: torch.save(classifier(net, real['image'][kept:], real['label'][kept:], a.steps).state_dict(), judge)
    net.eval()
    held_out = right(net, to_float(real['image'][:kept]), real['label'][:kept]).float().mean().item()
    print(f'the classifier finds {held_out:.1%} of {kept} held-out real pictures', flush=True)
    ldm, labels = LatentDiffusion.from_pretrained(a.work), torch.arange(len(names)).repeat_interleave(a.each)
    rows = []
    for w in a.guidance:
        x = ldm.sample(labels.tolist(), steps=25, sampler='dpmpp_2m', guidance=w, seed=0)
        found = right(net, x, labels).float().view(len(names), a.each).mean(1)
        share = found.mean().item()
        rows.append(dict(guidance=w, accuracy=round(share, 4), interval=[round(v, 4) for v in wilson(share, len(x))],
                         of_each={n: round(v, 3) for n, v in zip(names, found.tolist())}))
        print(rows[-1], flush=True)
        some = x.view(len(names), a.each, *x.shape[1:])[:, :8].flatten(0, 1)
        if w in (1., 3.):
            sheet = a.out.with_name(f'{a.out.stem}-{w:g}.jpg')
            save_grid(some, sheet)
            Image.open(sheet).resize((480, 600)).save(sheet, quality=75)
    trained_by = ' '.join(command).replace(str(a.data), 'FOLDER')
    command = f'python tests/prove/own_folder.py --data FOLDER --each {a.each}'
    about = dict(command=command, trained_by=trained_by, pictures=len(real['image']), drawn_of_each=a.each, seed=0,
                 chance=1/len(names), classifier_on_held_out=round(held_out, 4), device='cpu',
                 threads=torch.get_num_threads(), minutes=round((time.time() - start)/60, 1),
                 training=json.loads((a.work/'config.json').read_text().replace(str(a.data), 'FOLDER'))['card'])
    with atomic_path(a.out) as path: path.write_text(json.dumps(about | dict(drawn=rows), indent=1) + '\n')
