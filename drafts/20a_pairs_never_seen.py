# A section of chapter 20a, before `## What a word looks at`: it waits for data/results/holdout.json and holdout.jpg (tests/prove/holdout.py).
# It needs `from PIL import Image`.

# %% [markdown]
# ## Pairs never seen together
#
# The shipped model has seen all combinations, so that the table above may be memory. The clean test: train a model in whose world each colour of house lacks
# one season, a different one for each colour, and ask for those. Every colour and every season is seen equally often; only the four pairs are missing.
# `tests/prove/holdout.py` did it, in a world of houses and few trees.

# %%
h = json.loads(Path('../data/results/holdout.json').read_text())
card = h['card']
print(f'{h["command"]}\n{card["command"]}')
print(f'seed {card["seed"]}, {card["steps"]} steps on {card["device"]} in {card["precision"]}, {card["threads"]} thread, {card["hours"]*60:.0f} minutes')
print('left out:', ', '.join(f'{colour} in {season}' for colour, season in h['held_out'].items()))
HOLDOUT-ASSERTS

# %%
def share_of(model, held, what): # share, interval and number of pictures
    rs = [r for r in h['models'][model] if r['held_out'] == held]
    right, n = sum(r[what] for r in rs), sum(r['n'] for r in rs)
    return Measured(right/n, *wilson(right/n, n), n)

for model, held in product(h['models'], (False, True)):
    print(f'{model}, pairs {"held out" if held else "seen"}:')
    for what in ('colour', 'right_season', 'both'): print(f'    {what.removeprefix("right_"):7} {share_of(model, held, what)}')

# %%
both = np.array([r['both']/r['n'] for r in h['models']['trained without them']]).reshape(4, 4).T          # season, colour
fig, axs = plt.subplots(1, 2, figsize=(8, 3.6), layout='constrained')
axs[0].imshow(Image.open('../data/results/holdout.jpg'), extent=(-.5, 3.5, 3.5, -.5)); axs[1].imshow(both, vmin=0, vmax=1, cmap='viridis')
for ax, title in zip(axs, ('drawn at noon', 'colour and season right, all times')):
    ax.set(xticks=range(4), xticklabels=colours, yticks=range(4), yticklabels=SEASONS, title=title)
    for colour, season in h['held_out'].items():
        ax.add_patch(plt.Rectangle((colours.index(colour) - .48, SEASONS.index(season) - .48), .96, .96, fill=False, ec='r', lw=2))
for (a, b), v in np.ndenumerate(both): axs[1].text(b, a, f'{v:.0%}', ha='center', va='center', color='w' if v < .6 else 'k')

# %% [markdown]
# HOLDOUT-TEXT
#
