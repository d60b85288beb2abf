"""One-line bugs planted one at a time in a copy of the tree: which test notices each of them? The line is changed in
the module and in the notebook that exports it, so that the chapter's own cells run on the changed code. Writes
data/results/planted.json: bug -> noticed by -> seconds.

    python tests/prove/planted.py                    all of them: about half an hour on one core
    python tests/prove/planted.py --only kl-sign     one, by name (several: --only a b)
    python tests/prove/planted.py --list             their names and lines
    python tests/prove/planted.py --missing          those that data/results/planted.json does not have noticed yet"""
import argparse, contextlib, json, multiprocessing, os, re, shutil, signal, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT = 420                                                  # seconds for a test on one bug
PRELOAD = ['torch', 'torchvision', 'accelerate', 'transformers', 'torchmetrics', 'matplotlib.pyplot', 'nbdev.test',
           'execnb.shell', 'pytest', 'scipy.stats', 'skimage', 'safetensors.torch', 'tokenizers', 'einops']
LAST = 'tests/test_noticed.py'                               # asked when the chapter and others noticed nothing

# name -> (module, the line or a part of it that occurs once, what takes its place, more tests that may notice it)
BUGS = {
    # signs, indices, roots: the process and its samplers
    'abar-index': ('diffusion', 'return table_on(schedule, t.device)[t]',
                   'return table_on(schedule, t.device)[(t + 1).clamp(max=len(schedule) - 1)]'),
    'v-target-sign': ('diffusion', 'return signal*eps - noise*z0', 'return noise*z0 - signal*eps'),
    'sigma-without-root': ('diffusion', 'self.sigma = ((1 - self.abar)/self.abar).sqrt()',
                           'self.sigma = ((1 - self.abar)/self.abar)'),
    'loss-summed': ('diffusion', 'error = error.flatten(1).mean(1)', 'error = error.flatten(1).sum(1)'),
    'min-snr-of-v': ('diffusion', 'v=snr + 1)', 'v=snr)'),
    'plms-coefficient': ('samplers', '(23/12, -16/12, 5/12)', '(23/12, -15/12, 4/12)'),
    'ddim-noise-without-root': ('samplers', 'fresh = eta*to*(1 - (to/s)**2)**.5', 'fresh = eta*to*(1 - (to/s)**2)'),
    'ddpm-not-squared': ('samplers', 'z = z0_hat + (to/s)**2*(z - z0_hat)', 'z = z0_hat + (to/s)*(z - z0_hat)'),
    'dpm-not-halved': ('samplers', 'math.log(s/to)/math.log(before/s)/2*(new - old)',
                       'math.log(s/to)/math.log(before/s)*(new - old)'),
    'published-steps-off-by-one': ('samplers', 'return [t + 1 for t in range(0, T, T//steps)][::-1]',
                                   'return [t for t in range(0, T, T//steps)][::-1]'),
    'strength-cuts-the-other-end': ('samplers', 'return sigmas[steps - max(1, round(strength*steps)):]',
                                    'return sigmas[:max(1, round(strength*steps)) + 1]'),
    'guidance-swapped': ('guidance', 'out = uncond.lerp(cond, g.w)', 'out = cond.lerp(uncond, g.w)'),
    'interval-inverted': ('guidance', 'inside = low <= s.min() and s.max() <= high',
                          'inside = not (low <= s.min() and s.max() <= high)'),
    'rescale-inverted': ('guidance', 'return out.lerp(out*size(cond)/size(out), share)',
                         'return out.lerp(out*size(out)/size(cond), share)'),
    # layers and networks
    'sines-first': ('layers', '[angle.cos(), angle.sin()]', '[angle.sin(), angle.cos()]'),
    'padding-side': ('layers', 'h = F.pad(h, (0, 1, 0, 1))', 'h = F.pad(h, (1, 0, 1, 0))'),
    'scale-without-one': ('layers', 'r = self.norm2(r)*(1 + scale) + shift', 'r = self.norm2(r)*scale + shift'),
    'qkv-order': ('layers', "'b n (three heads d) -> three b heads n d'", "'b n (heads three d) -> three b heads n d'"),
    'groups-of-the-last-norm': ('unet', 'self.norm_out = norm(ch*ch_mult[0], groups, 1e-5)',
                                'self.norm_out = norm(ch*ch_mult[0], 1, 1e-5)', 'tests/test_unet.py'),
    'skips-in-the-wrong-order': ('unet', 'h = self.run(layer, h, emb, c.context, skips.pop())',
                                 'h = self.run(layer, h, emb, c.context, skips.pop(-1 if len(skips) % 3 else 0))'),
    'attention-scale': ('attention', 'scores = q @ k.mT*q.shape[-1]**-.5', 'scores = q @ k.mT'),
    'wrong-half-gates': ('attention', 'return self.out(x*F.gelu(gate))', 'return self.out(gate*F.gelu(x))'),
    'heads-cut-across': ('attention', "rearrange(y, 'b n (heads d) -> b heads n d', heads=self.heads)",
                         "rearrange(y, 'b n (d heads) -> b heads n d', heads=self.heads)",
                         'tests/test_unet.py'),
    # the first stage and its losses
    'kl-sign': ('autoencoder', '.5*(self.mean**2 + self.logvar.exp() - 1 - self.logvar)',
                '.5*(self.mean**2 + self.logvar.exp() - 1 + self.logvar)'),
    'variance-for-deviation': ('autoencoder', 'return self.mean + (.5*self.logvar).exp()*eps',
                               'return self.mean + self.logvar.exp()*eps'),
    'straight-through': ('autoencoder', 'return self.raw + (self.nearest - self.raw).detach()',
                         'return self.raw - self.raw.detach() + self.nearest'),
    'commitment-moves-the-code': ('autoencoder', 'return (self.raw - self.nearest.detach()).square()',
                                  'return (self.raw.detach() - self.nearest).square()'),
    'nearest-by-half-a-product': ('autoencoder', 'e.square().sum(1) - 2*part@e.T', 'e.square().sum(1) - part@e.T'),
    'scale-from-the-mean-square': ('autoencoder', 'ae.latent_scale.copy_(1/raw.std(1)[:, None, None]',
                                   'ae.latent_scale.copy_(1/raw.square().mean(1).sqrt()[:, None, None]'),
    'scale-twice': ('autoencoder', 'raw = z/self.latent_scale + self.latent_shift',
                    'raw = z/self.latent_scale**2 + self.latent_shift'),
    'scale-never': ('autoencoder', 'return (raw - self.latent_shift)*self.latent_scale',
                    'return raw - self.latent_shift'),
    'padded-on-the-left': ('autoencoder', 'return F.pad(x, (0, w, 0, h), mode=mode)',
                           'return F.pad(x, (w, 0, h, 0), mode=mode)'),
    'kl-not-normalised': ('losses', 'return self.kl_weight*q.kl().float().mean()/numel',
                          'return self.kl_weight*q.kl().float().mean()'),
    'beta-on-the-other-term': ('losses', "(self.beta, 1.) if self.beta_on == 'commitment' else (1., self.beta)",
                               "(1., self.beta) if self.beta_on == 'commitment' else (self.beta, 1.)"),
    'hinge-sign': ('losses', 'F.relu(1 + fake).mean()', 'F.relu(1 - fake).mean()'),
    'adaptive-weight-inverted': ('losses', '(norm(rec)/(norm(term) + 1e-4))', '(norm(term)/(norm(rec) + 1e-4))'),
    'live-codes-restart': ('losses', 'dead = (~self.used).nonzero().flatten()',
                           'dead = self.used.nonzero().flatten()'),
    # training, resuming, random numbers
    'average-unused': ('training', 'twin.load_state_dict(self.ema.state)',
                       'twin.load_state_dict(self.model.state_dict())'),
    'average-without-warm-up': ('training', 'd = min(self.decay, (1 + self.updates)/(10 + self.updates))',
                                'd = self.decay'),
    'accumulated-not-divided': ('training', 'loss = self.objective(batch, rng)/len(self.micro_batches)',
                                'loss = self.objective(batch, rng)'),
    'rate-starts-at-zero': ('training', 'if step < rise: return (step + 1)/rise', 'if step < rise: return step/rise'),
    'one-dropout-for-all-steps': ('training', 'seed_of(self.seed, 2, self.steps_done, acc.process_index)',
                                  'seed_of(self.seed, 2, 0, acc.process_index)'),
    'mean-not-restored': ('training', "self.mean = state['mean']", 'self.mean = None'),
    'moments-not-restored': ('training', "load_optimizer(self.opt, state['opt'])", 'pass'),
    'warm-up-begins-again': ('training', "self.ema.updates = state['ema_updates']", 'self.ema.updates = 0'),
    'guard-not-restored': ('engine/callbacks', "self.first, self.lowest, self.last = state['first'], ",
                           "self.first, self.lowest, self.last = None, "),
    'one-noise-for-all-items': ('engine/seeds', 'self.streams = [generator(seed, 0, i) for i in items]',
                                'self.streams = [generator(seed, 0, 0) for i in items]'),
    'one-order-for-all-epochs': ('engine/seeds', 'generator=generator(seed, 1, epoch))[k:k + batch_size]',
                                 'generator=generator(seed, 1, 0))[k:k + batch_size]'),
    'variants-start-at-zero': ('engine/cache', 'vary(x, name, start)', 'vary(x, name, 0)'),
    'cached-variance': ('engine/cache', 'both = torch.stack([g.mean, (.5*g.logvar).exp()])',
                        'both = torch.stack([g.mean, g.logvar.exp()])'),
    'fresh-pictures-of-the-training-seed': ('cli/recipes', "200, s['seed'] + 1, held_out=True)",
                                            "200, s['seed'], held_out=True)"),
    'trained-on-unscaled-latents': ('cli/recipes', 'ldm.autoencoder.to_latent(raw), c, t, eps)', 'raw, c, t, eps)'),
    # conditions and data
    'dropout-share-inverted': ('embedders', 'dropped = (u < p)', 'dropped = (u > p)'),
    'null-is-class-0': ('embedders', 'self.table.weight[-1].expand(n, 1, -1)', 'self.table.weight[0].expand(n, 1, -1)'),
    'mean-over-the-padding': ('embedders', 'used = (ids != self.pad)', 'used = (ids == self.pad)'),
    'pads-first': ('text', "return ids + [self.ids['[PAD]']]*(room - len(enc.ids))",
                   "return [self.ids['[PAD]']]*(room - len(enc.ids)) + ids"),
    'walk-starts-too-small': ('core', 'return unit*(1 + sigma**2)**.5', 'return unit*sigma',
                              'tests/test_api.py', 'tests/test_recorded.py'),
    'prompts-interleaved': ('request', 'prompts = [p for p in each for _ in range(n)]',
                            'prompts = [p for _ in range(n) for p in each]'),
    'training-mask-inverted': ('paper/conditions', 'dict(image=x, mask=m)', 'dict(image=x, mask=1 - m)',
                               'tests/test_conditions.py'),
    'the-known-blanked': ('paper/images', 'torch.where(mask > 0, self.hole, x)', 'torch.where(mask > 0, x, self.hole)'),
    'boxes-mirrored': ('paper/layouts', 'self.n_classes + at[:, k + 1]*self.grid + at[:, k]',
                       'self.n_classes + at[:, k + 1]*self.grid + self.grid - 1 - at[:, k]'),
    'classes-shifted': ('datasets/folders', "out['label'] = self.classes.index(self.class_of(p))",
                        "out['label'] = self.classes.index(self.class_of(p)) + 1"),
    'class-ids-shifted': ('datasets/sources', "'label': torch.tensor([ids[c] for c in names])",
                          "'label': torch.tensor([ids[c] + 1 for c in names])"),
    'pictures-on-their-side': ('datasets/pictures', 'ImageOps.exif_transpose(im, in_place=True)', 'im.getexif()'),
    'painted-is-kept': ('datasets/images', 'return torch.from_numpy(alpha > 127)[None].float()',
                        'return torch.from_numpy(alpha < 128)[None].float()'),
    'seeds-overlap': ('datasets/postcards', 'random_scene(np.random.default_rng([self.seed, i]))',
                      'random_scene(np.random.default_rng(self.seed + i))'),
    'low-resolution-by-sum': ('datasets/masks', 'return F.avg_pool2d(x, factor)',
                              'return F.avg_pool2d(x, factor, divisor_override=1)'),
    # measures and tiles
    'interval-too-narrow': ('metrics/intervals', 'z = NormalDist().inv_cdf((1 + level)/2)',
                            'z = NormalDist().inv_cdf(level)'),
    'jackknife-not-scaled': ('metrics/intervals', '*((BLOCKS - 1)/BLOCKS*(without', '*(1/BLOCKS*(without'),
    'ball-to-the-neighbour-before': ('metrics/distances', '.kthvalue(k + 1, dim=1)', '.kthvalue(k, dim=1)'),
    'tiles-with-a-seam': ('fast/tiles', 'up = lambda k: (torch.arange(2*k) + .5)/(2*k)',
                          'up = lambda k: (torch.arange(2*k) + 1.)/(2*k)'),
    'norms-of-the-last-tile': ('fast/tiles', 'seen[m] = seen.get(m, 0) + torch.stack', 'seen[m] = torch.stack'),
}

def notebook_of(tree: Path, module: str) -> Path:
    "The notebook that exports a module, as the module's own header says."
    path = tree/'ldm_nb'/f'{module}.py'
    return (path.parent/re.search(r'File to edit: (\S+\.ipynb)', path.read_text())[1]).resolve()

def replaced(text: str, old: str, new: str, where) -> str:
    found = text.count(old)
    assert found == 1, f'{where}: {old!r} occurs {found} times; it must be there once'
    return text.replace(old, new)

def plant(tree: Path, module: str, old: str, new: str) -> dict[Path, str]: # path -> what was there before
    "Change one line, in the module and in the notebook."
    assert '\n' not in old + new and old != new
    path, nb = tree/'ldm_nb'/f'{module}.py', notebook_of(tree, module)
    before = {path: path.read_text(), nb: nb.read_text()}
    path.write_text(replaced(before[path], old, new, path.relative_to(tree)))
    book = json.loads(before[nb])
    cells = [c for c in book['cells'] if c['cell_type'] == 'code' and old in ''.join(c['source'])
             and re.search(r'^#\| *export', ''.join(c['source']), re.M)]
    assert len(cells) == 1, f'{nb.relative_to(tree)}: {old!r} is in {len(cells)} exported cells; expected one'
    cells[0]['source'] = replaced(''.join(cells[0]['source']), old, new, nb.relative_to(tree)).splitlines(True)
    nb.write_text(json.dumps(book))
    return before

def copy_tree(to: Path):
    "The tracked tree, without what is built; data are large and only read."
    skip = shutil.ignore_patterns('__pycache__', '_proc', '_pair', '.ipynb_checkpoints')
    for name in ('nbs', 'ldm_nb', 'tests', '.ci'): shutil.copytree(ROOT/name, to/name, ignore=skip)
    for name in ('settings.ini', 'pyproject.toml', 'setup.py', 'Makefile', 'README.md'):
        if (ROOT/name).is_file(): shutil.copy(ROOT/name, to/name)
    (to/'data').symlink_to(ROOT/'data')

def look(tree: str, test: str, log: str):
    "In a process of its own: run a notebook as nbdev_test does, or a test of pytest; its exit code says how it went."
    os.setsid()
    multiprocessing.set_start_method(None, force=True)         # of its own processes: as usual here
    os.chdir(tree)
    os.environ |= dict(PYTHONPATH=tree, OMP_NUM_THREADS='1', PYTHONDONTWRITEBYTECODE='1')
    sys.dont_write_bytecode = True
    sys.path[:] = [tree] + [p for p in sys.path if Path(p or '.').resolve() not in (ROOT, Path(__file__).parent)]
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    import ldm_nb, torch
    torch.set_num_threads(1)
    assert Path(ldm_nb.__file__).parent == Path(tree)/'ldm_nb', ldm_nb.__file__
    if test.endswith('.ipynb'):
        from nbdev.test import test_nb
        os.environ['IN_TEST'] = '1'
        good, _ = test_nb(Path(tree)/test, skip_flags={'slow', 'cuda'}, force_flags=set(), basepath=Path(tree))
        os._exit(not good)
    import pytest
    os._exit(int(pytest.main(['-x', '-q', '--tb=short', '-p', 'no:cacheprovider', *test.split()])))

def noticed(ctx, tree: Path, test: str) -> tuple[bool, float, str]: # whether it failed; seconds; its last words
    "Run one test on the tree as it is. A test that does not end in time has noticed something, too."
    start, log = time.time(), tree.parent/'log.txt'
    p = ctx.Process(target=look, args=(str(tree), test, str(log)))
    p.start()
    p.join(LIMIT)
    late = p.is_alive()
    with contextlib.suppress(ProcessLookupError): os.killpg(p.pid, signal.SIGKILL)    # it and all that it started
    p.join()
    said = [o for o in log.read_text(errors='replace').splitlines() if o.strip()] if log.exists() else []
    why = next((o for o in reversed(said) if re.match(r'(E +)?\w*(Error|Exception|Interrupt)\b', o)), '')
    return late or p.exitcode != 0, round(time.time() - start, 1), 'no end' if late else why.strip()[:160]

def sound(ctx, tree: Path, test: str, before: dict[Path, str]) -> bool: # before: as `plant` gives it
    "Whether a test passes without the bug, which is there again afterwards."
    planted = {path: path.read_text() for path in before}
    for path, text in before.items(): path.write_text(text)
    failed, _, why = noticed(ctx, tree, test)
    if failed: print(f'{test} fails without any bug: {why}', flush=True)
    for path, text in planted.items(): path.write_text(text)
    return not failed

def main(a):
    names = a.only or list(BUGS)
    if odd := [n for n in names if n not in BUGS]: sys.exit(f'no bug {odd[0]!r}; --list shows them')
    if a.list:
        for n in names: print(f'{n:36} {BUGS[n][0]:18} {BUGS[n][1]}\n{"":56}{BUGS[n][2]}')
        return
    rows = json.loads(a.out.read_text())['bugs'] if a.out.is_file() and (a.only or a.missing) else {}
    if a.missing: names = [n for n in names if not rows.get(n, {}).get('noticed by')]
    healthy = {} # test -> whether it passes without any bug
    ctx = multiprocessing.get_context('forkserver')
    ctx.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as tmp:
        tree = Path(tmp)/'tree'
        tree.mkdir()
        copy_tree(tree)
        for name in names:
            module, old, new, *more = BUGS[name]
            tests = [str(notebook_of(tree, module).relative_to(tree)), *more, LAST]
            before, by, spent, why = plant(tree, module, old, new), [], {}, ''
            try:
                for test in tests:
                    if healthy.get(test) is False: continue
                    seen, spent[test], said = noticed(ctx, tree, test)
                    if seen and test not in healthy: # does it fail anyhow? Then it has noticed nothing
                        healthy[test] = sound(ctx, tree, test, before)
                    if not seen or not healthy[test]: continue
                    by, why = by + [test], why or said
                    if not a.all: break
            finally:
                for path, text in before.items(): path.write_text(text)
            rows[name] = {'module': module, 'line': old, 'planted': new, 'noticed by': by, 'said': why if by else '',
                          'seconds': spent}
            print(f'{name:36} {", ".join(by) or "NOBODY"}  {spent}  {why if by else ""}', flush=True)
            write(a, rows)
    alive = [n for n in names if not rows[n]['noticed by']]
    print(f'{len(names) - len(alive)} of {len(names)} noticed' + (f'; not: {", ".join(alive)}' if alive else ''))
    sys.exit(bool(alive))

def write(a, rows: dict):
    import torch
    a.out.parent.mkdir(parents=True, exist_ok=True)
    about = dict(command='python tests/prove/planted.py', device='cpu', threads=1, torch=torch.__version__,
                 minutes=round(sum(sum(r['seconds'].values()) for r in rows.values())/60, 1),
                 noticed=sum(bool(r['noticed by']) for r in rows.values()), of=len(BUGS))
    a.out.write_text(json.dumps(about | dict(bugs={n: rows[n] for n in BUGS if n in rows}), indent=1) + '\n')

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', nargs='+', help='names of bugs')
    p.add_argument('--list', action='store_true', help='show them and plant none')
    p.add_argument('--missing', action='store_true', help='those that the results do not show as noticed')
    p.add_argument('--all', action='store_true', help='run every test that may notice, not only up to the first')
    p.add_argument('--out', type=Path, default=ROOT/'data'/'results'/'planted.json')
    main(p.parse_args())
