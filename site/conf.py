"How Sphinx builds the site. The pages come from build.py; nothing is run, and nothing is loaded from elsewhere."
project = 'ldm_nb'
author = 'the ldm_nb authors'
project_copyright = '2026 onwards, the ldm_nb authors'
language = 'en'
extensions = ['myst_nb', 'sphinx_copybutton']
exclude_patterns = []
suppress_warnings = ['misc.highlighting_failure']

nb_execution_mode = 'off'
nb_merge_streams = True
nb_render_markdown_format = 'myst'
nb_number_source_lines = False
myst_enable_extensions = ['dollarmath', 'amsmath', 'fieldlist', 'colon_fence']
myst_heading_anchors = 6
myst_dmath_double_inline = True
copybutton_selector = 'div.cell_input pre, div[class*="highlight-"]:not(.output) pre'
copybutton_exclude = '.linenos, .gp, .go'

# formulas: MathJax and its font lie in the site
mathjax_path = 'mathjax/tex-chtml.js'
mathjax4_config = {'loader': {'paths': {'fonts': '[mathjax]/../mathjax-fonts'}},
                   'output': {'displayOverflow': 'scroll'}}

add_module_names = False
toc_object_entries_show_parents = 'hide'
maximum_signature_line_length = 80
html_domain_indices = html_use_index = False
html_copy_source = html_show_sourcelink = False
html_title = 'ldm_nb: latent diffusion from nothing'
html_context = {'default_mode': 'auto'}
smartquotes_action = 'D' # dashes alone: quotes stay as in the code
html_theme = 'sphinx_book_theme'
html_static_path = ['_static']
html_css_files = ['course.css']
html_js_files = [('course.js', {'defer': 'defer'})]
html_favicon = '_static/icon.svg'
html_theme_options = dict(
    navbar_start=[], navbar_center=[], navbar_end=[], navbar_persistent=[],
    home_page_in_toc=True, show_navbar_depth=1, max_navbar_depth=3, use_download_button=False,
    use_fullscreen_button=False, toc_title='On this page', show_toc_level=2,
    pygments_light_style='github-light-high-contrast', pygments_dark_style='github-dark-high-contrast',
    footer_content_items='copyright.html', search_bar_text='Search the course')
