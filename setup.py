"Everything about the package stands in settings.ini; this file only hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

config = ConfigParser(delimiters=['='], interpolation=None)
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
readme = Path('README.md')

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
    extras_require={'dev': cfg['dev_requirements'].split()},
    entry_points={'console_scripts': cfg['console_scripts'].split()},
    zip_safe=False,
)
