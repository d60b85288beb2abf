"All about the package stands in settings.ini; this file hands it to setuptools, and puts the models into a wheel."
from configparser import ConfigParser
from pathlib import Path
from shutil import copytree, rmtree
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

config = ConfigParser(delimiters=['='], interpolation=None)
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
readme = Path('README.md')


class BuildWithData(build_py):
    "What exported code reads of data/ goes into the package as ldm_nb/shipped; an editable install reads data/ itself."
    def run(self):
        super().run()
        if self.editable_mode: return
        shipped = Path(self.build_lib)/cfg['lib_path']/'shipped'
        rmtree(shipped, ignore_errors=True) # of an earlier build
        for part in ('pretrained', 'tokenizer'): copytree(Path('data')/part, shipped/part)


setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme.read_text(encoding='utf-8') if readme.is_file() else '',
    long_description_content_type='text/markdown',
    author=cfg['author'],
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords=cfg['keywords'].split(),
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*']),
    python_requires='>=' + cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require={'dev': cfg['dev_requirements'].split(), 'emoji': cfg['emoji_requirements'].split()},
    entry_points={'console_scripts': cfg['console_scripts'].split()},
    cmdclass={'build_py': BuildWithData},
    zip_safe=False,
)
